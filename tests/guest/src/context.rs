//! What a job knows and can do: its arguments, facts for the host, questions to the host, child processes.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{ChildStdout, Command, Stdio};

use foliant_guest::protocol::{Answer, JobPlan, Line};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::port::Port;

/// One job's surroundings.
pub(crate) struct Context<'a> {
    port: &'a Port,
    plan: &'a JobPlan,
}

impl<'a> Context<'a> {
    pub(crate) fn new(port: &'a Port, plan: &'a JobPlan) -> Self {
        Self { port, plan }
    }

    /// The job's arguments.
    pub(crate) fn arguments<T: DeserializeOwned>(&self) -> T {
        serde_json::from_value(self.plan.arguments.clone())
            .unwrap_or_else(|error| panic!("the arguments {}: {error}", self.plan.arguments))
    }

    /// Tells the host something to check.
    pub(crate) fn fact(&self, name: &str, value: impl Serialize) {
        let value = serde_json::to_value(value).expect("a fact is plain data");
        self.port.send(&Line::Fact { claim: self.plan.claim.clone(), name: name.into(), value });
    }

    /// Wants something done by the host, and waits until it is.
    pub(crate) fn ask(&self, what: &str, arguments: impl Serialize) -> Value {
        let arguments = serde_json::to_value(arguments).expect("a question is plain data");
        let line = Line::Ask { claim: self.plan.claim.clone(), what: what.into(), arguments };
        match self.port.ask(&line) {
            Answer::Done(value) => value,
            Answer::Failed(reason) => panic!("the host could not do {what:?}: {reason}"),
        }
    }

    /// Starts another job in a process of its own, as `user`.
    pub(crate) fn child(&self, job: &str, arguments: impl Serialize, user: User) -> Child<'a> {
        let arguments = serde_json::to_string(&arguments).expect("arguments are plain data");
        let mut command = Command::new("/proc/self/exe");
        command.args(["child", &self.plan.claim, job, &arguments]).stdout(Stdio::piped());
        if let User::Ordinary = user {
            command.uid(ORDINARY_UID).gid(ORDINARY_UID);
        }
        let mut process = command.spawn().unwrap_or_else(|error| panic!("a child process: {error}"));
        let lines = BufReader::new(process.stdout.take().expect("its output is piped"));
        Child { port: self.port, process, lines }
    }
}

/// Whose process a child is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum User {
    /// The user of the first process.
    Root,
    /// [`ORDINARY_UID`], without any capability.
    Ordinary,
}

/// The ordinary user's and group's number.
pub(crate) const ORDINARY_UID: u32 = 1000;

/// A job in another process.
pub(crate) struct Child<'a> {
    port: &'a Port,
    process: std::process::Child,
    lines: BufReader<ChildStdout>,
}

impl Child<'_> {
    /// The value of the child's next fact called `name`; other facts are passed over.
    ///
    /// # Panics
    /// When the child ends before.
    pub(crate) fn fact(&mut self, name: &str) -> Value {
        loop {
            match self.line() {
                Some(Line::Fact { name: given, value, .. }) if given == name => return value,
                Some(Line::Verdict { failure, .. }) => panic!("the child ended before {name:?}: {failure:?}"),
                Some(_) => {}
                None => panic!("the child died before {name:?}: {:?}", self.process.wait()),
            }
        }
    }

    /// Waits for the child's end and returns why it failed, if it did.
    pub(crate) fn failure(mut self) -> Option<String> {
        let mut verdict = None;
        while let Some(line) = self.line() {
            if let Line::Verdict { failure, .. } = line {
                verdict = Some(failure);
            }
        }
        let status = self.process.wait().expect("a child can be waited for");
        verdict.unwrap_or_else(|| Some(format!("it ended without a verdict: {status}")))
    }

    /// Waits for the child's end.
    ///
    /// # Panics
    /// When it failed.
    pub(crate) fn finish(self) {
        if let Some(failure) = self.failure() {
            panic!("in the child process: {failure}");
        }
    }

    /// Kills the child as SIGKILL does, and waits until it is gone.
    pub(crate) fn kill(mut self) {
        self.process.kill().expect("the child is there to be killed");
        self.process.wait().map(drop).expect("a child can be waited for");
    }

    /// The child's process id.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// The child's next line; a fact goes on to the host as well.
    fn line(&mut self) -> Option<Line> {
        let mut text = String::new();
        loop {
            text.clear();
            if self.lines.read_line(&mut text).expect("a pipe can be read") == 0 {
                return None;
            }
            if let Some(line) = Line::decode(&text) {
                if let Line::Fact { .. } = line {
                    self.port.send(&line);
                }
                return Some(line);
            }
        }
    }
}

impl Drop for Child<'_> {
    /// A job that fails leaves nobody behind who has the device.
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}
