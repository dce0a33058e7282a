//! QEMU's monitor: commands while a guest runs.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{LabError, Result};

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub struct Monitor {
    lines: BufReader<UnixStream>,
    /// Events that came while an answer was waited for.
    events: Vec<Value>,
}

/// How long QEMU may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(20);

impl Monitor {
    /// Speaks with the QEMU at the other end of `stream`.
    ///
    /// # Errors
    /// [`LabError::Monitor`] when it doesn't greet.
    pub(crate) fn new(stream: UnixStream) -> Result<Self> {
        let mut monitor = Self { lines: BufReader::new(stream), events: Vec::new() };
        let greeting = monitor.message(Instant::now() + ANSWER_MAX)?;
        if greeting.get("QMP").is_none() {
            return Err(LabError::Monitor(format!("it greets with {greeting}")));
        }
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Executes a command and returns its answer.
    ///
    /// # Errors
    /// [`LabError::Monitor`] when QEMU refuses it or doesn't answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let text = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        let failed = |error: std::io::Error| LabError::Monitor(format!("{command}: {error}"));
        self.lines.get_mut().write_all(text.as_bytes()).map_err(failed)?;
        let deadline = Instant::now() + ANSWER_MAX;
        loop {
            let mut message = self.message(deadline)?;
            if message.get("event").is_some() {
                self.events.push(message);
            } else if let Some(error) = message.get("error") {
                return Err(LabError::Monitor(format!("{command}: {error}")));
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// Waits for the event `name` that `wanted` accepts, among those that came and those that will.
    ///
    /// # Errors
    /// [`LabError::Monitor`] when it doesn't come within `limit`.
    pub fn wait_for(
        &mut self,
        name: &str,
        limit: Duration,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + limit;
        let fits = |event: &Value| event["event"] == name && wanted(&event["data"]);
        if let Some(at) = self.events.iter().position(fits) {
            return Ok(self.events.remove(at));
        }
        loop {
            let message = self.message(deadline)?;
            if fits(&message) {
                return Ok(message);
            }
            self.events.push(message);
        }
    }

    fn message(&mut self, deadline: Instant) -> Result<Value> {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let failed = |error: std::io::Error| LabError::Monitor(error.to_string());
        self.lines.get_ref().set_read_timeout(Some(left)).map_err(failed)?;
        let mut text = String::new();
        if self.lines.read_line(&mut text).map_err(failed)? == 0 {
            return Err(LabError::Monitor("the connection is closed".into()));
        }
        serde_json::from_str(&text).map_err(|error| LabError::Monitor(format!("{error}: {text:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_before_the_answer_is_kept() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"{\"QMP\":{}}\n{\"return\":{}}\n").unwrap();
        let mut monitor = Monitor::new(ours).unwrap();
        theirs.write_all(b"{\"event\":\"GONE\",\"data\":{\"device\":\"x\"}}\n{\"return\":7}\n").unwrap();
        assert_eq!(monitor.execute("what", json!({})).unwrap(), 7);
        monitor.wait_for("GONE", Duration::from_secs(1), |data| data["device"] == "x").unwrap();
        theirs.write_all(b"{\"error\":{\"desc\":\"no\"}}\n").unwrap();
        assert!(monitor.execute("what", json!({})).is_err());
    }
}
