//! What the doctor says of one thing.

use serde::Serialize;

/// How long a line of text is at most, before what stands in front of it.
const LINE_CHARACTERS: usize = 90;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Severity {
    /// A device can't be driven until it's mended.
    Blocks,
    /// A device can be driven, but slower or less safely.
    Slows,
    /// As it should be.
    Fine,
}

impl Severity {
    const fn word(self) -> &'static str {
        match self {
            Self::Blocks => "blocks",
            Self::Slows => "slows ",
            Self::Fine => "fine  ",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) area: &'static str,
    pub(super) severity: Severity,
    /// What is so, and why it matters.
    pub(super) says: String,
    /// What mends it, in this order; empty where no command can.
    pub(super) commands: Vec<String>,
    /// Whether the machine has to be booted anew after that.
    pub(super) reboot: bool,
}

impl Finding {
    pub(super) fn fine(area: &'static str, says: impl Into<String>) -> Self {
        Self::new(area, Severity::Fine, says)
    }

    pub(super) fn slows(area: &'static str, says: impl Into<String>) -> Self {
        Self::new(area, Severity::Slows, says)
    }

    pub(super) fn blocks(area: &'static str, says: impl Into<String>) -> Self {
        Self::new(area, Severity::Blocks, says)
    }

    pub(super) fn new(area: &'static str, severity: Severity, says: impl Into<String>) -> Self {
        Self { area, severity, says: says.into(), commands: Vec::new(), reboot: false }
    }

    /// Adds a command.
    pub(super) fn run(mut self, command: impl Into<String>) -> Self {
        self.commands.push(command.into());
        self
    }

    /// Says that it takes a reboot.
    pub(super) fn reboot(mut self) -> Self {
        self.reboot = true;
        self
    }

    /// For people: what it says, the commands under it, and the reboot.
    pub(super) fn lines(&self) -> Vec<String> {
        let mut lines = wrapped(&self.says);
        for (index, line) in lines.iter_mut().enumerate() {
            *line = format!("{}  {line}", if index == 0 { self.severity.word() } else { "      " });
        }
        // Commands stay whole, to be copied.
        lines.extend(self.commands.iter().map(|command| format!("          $ {command}")));
        if self.reboot {
            lines.push("          $ reboot".to_owned());
        }
        lines
    }
}

/// A text in lines that a terminal shows whole.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().expect("there is a line from the start on");
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count() + 1 + word.chars().count() <= LINE_CHARACTERS {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}
