//! The way to the host: the lab's serial port, or for a child process its standard output.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::sync::Mutex;

use foliant_guest::protocol::{Answer, Line, PORT};
use rustix::termios::{OptionalActions, tcdrain, tcgetattr, tcsetattr};

/// Where lines go, and where answers come from.
pub(crate) struct Port {
    writer: Mutex<Box<dyn Write + Send>>,
    /// The serial port's other direction; a child has none.
    answers: Option<Mutex<BufReader<File>>>,
}

impl Port {
    /// The lab's serial port, in raw mode.
    pub(crate) fn serial() -> Self {
        let open = || File::options().read(true).write(true).open(PORT);
        let writer = open().unwrap_or_else(|error| panic!("the lab's serial port {PORT}: {error}"));
        let reader = open().expect("a port that opened once opens twice");
        let mut mode = tcgetattr(&writer).expect("a serial port has a mode");
        mode.make_raw();
        tcsetattr(&writer, OptionalActions::Now, &mode).expect("a serial port takes the raw mode");
        Self { writer: Mutex::new(Box::new(writer)), answers: Some(Mutex::new(BufReader::new(reader))) }
    }

    /// Standard output, for a child process whose parent reads it.
    pub(crate) fn stdout() -> Self {
        Self { writer: Mutex::new(Box::new(std::io::stdout())), answers: None }
    }

    /// Sends one line.
    pub(crate) fn send(&self, line: &Line) {
        let text = format!("{}\n", line.encode());
        let mut writer = self.writer.lock().expect("no line panics half-way");
        writer.write_all(text.as_bytes()).and_then(|()| writer.flush()).expect("the host listens");
    }

    /// Sends a question and waits for the host's answer.
    pub(crate) fn ask(&self, line: &Line) -> Answer {
        let answers = self.answers.as_ref().expect("only the first process asks the host");
        let mut answers = answers.lock().expect("no answer panics half-way");
        self.send(line);
        let mut text = String::new();
        answers.read_line(&mut text).expect("the host answers");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("the answer {text:?}: {error}"))
    }

    /// Waits until all that was sent has left the guest.
    pub(crate) fn drain(&self) {
        if self.answers.is_some() {
            let port = File::options().write(true).open(PORT).expect("the port is there");
            tcdrain(&port).expect("a serial port drains");
        }
    }
}
