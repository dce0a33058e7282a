//! `foliant top` on a terminal: keys, and when to read and draw again.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::Page;
use super::screen::{Mode, Screen};
use crate::cli::TopOptions;
use crate::error::Error;

/// The shortest and the longest time between two readings.
const INTERVALS_MS: std::ops::RangeInclusive<u64> = 100..=60_000;

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Quit,
    Pause,
    Slower,
    Faster,
    NextEngine,
}

fn wish(key: KeyEvent) -> Option<Wish> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    match key.code {
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Some(Wish::Quit),
        KeyCode::Char('q') | KeyCode::Esc => Some(Wish::Quit),
        KeyCode::Char('p' | ' ') => Some(Wish::Pause),
        KeyCode::Char('+' | '=') => Some(Wish::Slower),
        KeyCode::Char('-') => Some(Wish::Faster),
        KeyCode::Tab => Some(Wish::NextEngine),
        _ => None,
    }
}

/// Shows the pages until somebody has seen enough.
pub(super) fn run(pages: &mut [Page], options: &TopOptions) -> Result<(), Error> {
    if !std::io::stdout().is_terminal() {
        return Err(Error::NoTerminal);
    }
    let mut terminal = ratatui::try_init().map_err(Error::Stdout)?;
    let shown = show(&mut terminal, pages, options);
    ratatui::restore();
    shown
}

fn show(
    terminal: &mut ratatui::DefaultTerminal,
    pages: &mut [Page],
    options: &TopOptions,
) -> Result<(), Error> {
    let mut screens: Vec<Screen> = pages.iter().map(|_| Screen::default()).collect();
    let interval_ms =
        (options.interval().as_millis() as u64).clamp(*INTERVALS_MS.start(), *INTERVALS_MS.end());
    let mut mode = Mode { is_paused: false, interval_ms, engine: (1, pages.len()) };
    let mut next_reading = Instant::now();
    let mut shown = vec![None; pages.len()];
    loop {
        if !mode.is_paused && next_reading <= Instant::now() {
            // All of them, so that the next engine's history is there when it's asked for.
            for ((page, screen), shown) in pages.iter_mut().zip(&mut screens).zip(&mut shown) {
                page.watch()?;
                *shown = page.figures().ok();
                shown.iter().for_each(|figures| screen.note(figures));
            }
            next_reading = Instant::now() + Duration::from_millis(mode.interval_ms);
        }
        let at = mode.engine.0 - 1;
        if let Some(figures) = &shown[at] {
            terminal.draw(|frame| screens[at].draw(frame, figures, mode)).map_err(Error::Stdout)?;
        }
        let wait = if mode.is_paused { Duration::from_secs(3600) } else { next_reading - Instant::now() };
        if !event::poll(wait).map_err(Error::Stdout)? {
            continue;
        }
        let Event::Key(key) = event::read().map_err(Error::Stdout)? else { continue };
        match wish(key) {
            Some(Wish::Quit) => return Ok(()),
            Some(Wish::Pause) => mode.is_paused = !mode.is_paused,
            Some(Wish::Slower) => mode.interval_ms = (mode.interval_ms * 2).min(*INTERVALS_MS.end()),
            Some(Wish::Faster) => {
                mode.interval_ms = (mode.interval_ms / 2).max(*INTERVALS_MS.start());
                next_reading = next_reading.min(Instant::now() + Duration::from_millis(mode.interval_ms));
            }
            Some(Wish::NextEngine) => mode.engine.0 = mode.engine.0 % pages.len() + 1,
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_understood() {
        let plain = |code| KeyEvent::new(code, KeyModifiers::NONE);
        let cases = [
            (plain(KeyCode::Char('q')), Some(Wish::Quit)),
            (KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL), Some(Wish::Quit)),
            (plain(KeyCode::Char('c')), None),
            (plain(KeyCode::Char('p')), Some(Wish::Pause)),
            (plain(KeyCode::Char('+')), Some(Wish::Slower)),
            (plain(KeyCode::Char('-')), Some(Wish::Faster)),
            (plain(KeyCode::Tab), Some(Wish::NextEngine)),
        ];
        for (key, wanted) in cases {
            assert_eq!(wish(key), wanted, "{key:?}");
        }
        let released = KeyEvent { kind: KeyEventKind::Release, ..plain(KeyCode::Char('q')) };
        assert_eq!(wish(released), None);
    }
}
