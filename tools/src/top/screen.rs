//! How an engine's figures look on a terminal. It draws and nothing else: no clock, no keys, no files.

use std::collections::VecDeque;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Paragraph, RenderDirection, Row as TableRow, Sparkline, Table};

use super::figures::{Activity, COLUMNS, Figures, all_cells, short, throughput};
use crate::size::ByteSize;

/// Points of a history.
const HISTORY: usize = 512;

/// Between two columns.
const COLUMN_SPACING: usize = 2;
/// The columns that a narrow terminal does without, the first first.
const SPARED: [&str; 8] =
    ["write p50/p99", "gated", "wait", "wrback", "free", "sync p50/p99", "depth", "read p50/p99"];

/// What is shown.
#[derive(Debug, Default)]
pub(super) struct Screen {
    /// Newest first.
    accesses: VecDeque<u64>,
    read_bytes: VecDeque<u64>,
    written_bytes: VecDeque<u64>,
}

/// What is shown beside the figures.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    pub(super) is_paused: bool,
    pub(super) interval_ms: u64,
    /// Which of how many engines, from 1 on.
    pub(super) engine: (usize, usize),
}

impl Screen {
    /// Adds a point to the histories.
    pub(super) fn note(&mut self, figures: &Figures) {
        let total = &figures.total;
        for (history, value) in [
            (&mut self.accesses, total.hits_per_second + total.misses_per_second),
            (&mut self.read_bytes, total.read_bytes_per_second),
            (&mut self.written_bytes, total.written_bytes_per_second),
        ] {
            history.push_front(value as u64);
            history.truncate(HISTORY);
        }
    }

    pub(super) fn draw(&self, frame: &mut Frame<'_>, figures: &Figures, mode: Mode) {
        let rows = figures.shards.len() as u16 + 2;
        let [title, lines, line, _, histories, keys] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Max(rows),
            Constraint::Length(1),
            Constraint::Length(1),
            Constraint::Min(0),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(Paragraph::new(figures.title()).bold(), title);
        draw_table(frame, lines, figures);
        frame.render_widget(Paragraph::new(throughput(&figures.total)), line);
        self.draw_histories(frame, histories);
        draw_keys(frame, keys, mode);
    }

    fn draw_histories(&self, frame: &mut Frame<'_>, area: Rect) {
        let areas: [Rect; 3] = Layout::vertical([Constraint::Fill(1); 3]).spacing(1).areas(area);
        let histories = [
            ("page accesses", &self.accesses, Color::Green),
            ("read from the device", &self.read_bytes, Color::Cyan),
            ("written to the device", &self.written_bytes, Color::Yellow),
        ];
        for (area, (name, history, colour)) in areas.into_iter().zip(histories) {
            let show = |rate: u64| match std::ptr::eq(history, &self.accesses) {
                true => format!("{}/s", short(rate as f64)),
                false => format!("{}/s", ByteSize(rate)),
            };
            if area.height < 2 {
                continue;
            }
            let [name_area, graph] =
                Layout::vertical([Constraint::Length(1), Constraint::Min(1)]).areas(area);
            let visible = || history.iter().take(usize::from(graph.width)).copied();
            let (now, most) = (visible().next().unwrap_or(0), visible().max().unwrap_or(0));
            let text = format!("{name}  {} now, {} at most", show(now), show(most));
            frame.render_widget(Paragraph::new(text), name_area);
            let bars = Sparkline::default()
                .data(visible())
                .max(most.max(1))
                .direction(RenderDirection::RightToLeft)
                .style(Style::new().fg(colour));
            frame.render_widget(bars, graph);
        }
    }
}

fn draw_table(frame: &mut Frame<'_>, area: Rect, figures: &Figures) {
    let cells = all_cells(figures);
    let width = |column: usize| {
        let longest = cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        longest.max(COLUMNS[column].len())
    };
    let mut columns: Vec<usize> = (0..COLUMNS.len()).collect();
    let mut spared = SPARED.iter();
    while columns.iter().map(|&column| width(column) + COLUMN_SPACING).sum::<usize>()
        > usize::from(area.width) + COLUMN_SPACING
        && let Some(name) = spared.next()
    {
        columns.retain(|&column| COLUMNS[column] != *name);
    }
    let activities = figures.shards.iter().map(|row| row.activity).chain([figures.total.activity]);
    let last = cells.len() - 1;
    let rows = cells.iter().zip(activities).enumerate().map(|(index, (row, activity))| {
        let colour = match activity {
            Activity::Failed | Activity::Stalled => Style::new().fg(Color::Red),
            Activity::Asleep | Activity::Ended | Activity::New => Style::new().fg(Color::DarkGray),
            Activity::Awake => Style::new(),
        };
        let style = if index == last { colour.add_modifier(Modifier::BOLD) } else { colour };
        let right = columns.iter().map(|&column| Line::from(row[column].as_str()).right_aligned());
        TableRow::new(right.collect::<Vec<_>>()).style(style)
    });
    let header = columns.iter().map(|&column| Line::from(COLUMNS[column]).right_aligned());
    let widths = columns.iter().map(|&column| Constraint::Length(width(column) as u16));
    let table = Table::new(rows, widths)
        .header(TableRow::new(header).style(Style::new().add_modifier(Modifier::REVERSED)))
        .column_spacing(COLUMN_SPACING as u16);
    frame.render_widget(table, area);
}

fn draw_keys(frame: &mut Frame<'_>, area: Rect, mode: Mode) {
    let (at, of) = mode.engine;
    let key = |name: &'static str| Span::from(name).bold();
    let mut spans = vec![
        key("q"),
        " quit  ".into(),
        key("p"),
        if mode.is_paused { " go on  ".into() } else { " pause  ".into() },
        key("+ -"),
        format!(" every {} s  ", mode.interval_ms as f64 / 1e3).into(),
    ];
    if of > 1 {
        spans.extend([key("Tab"), format!(" next engine ({at} of {of})  ").into()]);
    }
    if mode.is_paused {
        spans.push(Span::from("paused").reversed());
    }
    frame.render_widget(Paragraph::new(Line::from(spans)), area);
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::figures;
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    const MODE: Mode = Mode { is_paused: false, interval_ms: 1000, engine: (1, 1) };

    fn drawn(width: u16, height: u16, figures: &Figures, mode: Mode) -> String {
        let mut screen = Screen::default();
        (0..3).for_each(|_| screen.note(figures));
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen.draw(frame, figures, mode)).unwrap();
        let buffer = terminal.backend().buffer();
        let lines = buffer.content().chunks(usize::from(width));
        lines.map(|line| line.iter().map(|cell| cell.symbol()).collect::<String>() + "\n").collect()
    }

    #[test]
    fn the_screen_shows_every_shard_their_sum_and_what_goes_over_the_bus() {
        let text = drawn(160, 30, &figures(), MODE);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("postgres (process 7) on vfio:0000:01:00.0, open for 2 h"), "{text}");
        for words in COLUMNS {
            assert!(lines[1].contains(words), "{words}: {text}");
        }
        for words in ["1.2M", "4321", "99.7 %", "17", "800", "3 @ 200 MiB/s", "81.0 us / 420.0 us"] {
            assert!(lines[2].contains(words), "{words}: {text}");
        }
        assert!(lines[3].contains("asleep"), "{text}");
        assert!(lines[4].trim_start().starts_with("all"), "{text}");
        assert!(text.contains("page accesses  1.2M/s now, 1.2M/s at most"), "{text}");
        assert!(text.contains("q quit"), "{text}");
        assert!(text.contains('█'), "there are bars: {text}");
    }

    #[test]
    fn a_pause_and_several_engines_are_told() {
        let text = drawn(160, 24, &figures(), Mode { is_paused: true, engine: (2, 3), ..MODE });
        assert!(text.contains("paused") && text.contains("p go on"), "{text}");
        assert!(text.contains("next engine (2 of 3)"), "{text}");
    }

    #[test]
    fn a_narrow_screen_does_without_some_columns_and_cuts_none() {
        let text = drawn(80, 24, &figures(), MODE);
        let lines: Vec<&str> = text.lines().collect();
        for words in ["hits/s", "miss/s", "hit %", "dirty", "throttle"] {
            assert!(lines[1].contains(words), "{words}: {text}");
        }
        assert!(!lines[1].contains("gated") && lines[2].contains("3 @ 200 MiB/s"), "{text}");
    }

    #[test]
    fn a_screen_of_any_size_is_drawn() {
        let mut figures = figures();
        figures.shards.extend(vec![figures.shards[0]; 100]);
        for (width, height) in [(1, 1), (10, 3), (80, 24), (300, 5), (40, 200)] {
            drawn(width, height, &figures, MODE);
        }
    }
}
