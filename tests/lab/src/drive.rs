//! What lies behind a namespace: an image on the host, and layers above it that fail, slow down, or write a log.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::command;
use crate::error::{LabError, Result};
use crate::packages;

/// A drive of a machine, from the image up.
#[derive(Clone, Debug, PartialEq)]
pub struct Drive {
    /// Its name; the image's file is called after it.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// What the image is.
    pub image: Image,
    /// Layers, the lowest first.
    pub layers: Vec<Layer>,
    /// What is on it at the start.
    pub content: Content,
    /// What a discard does.
    pub discard: Discard,
    /// How the image is accessed.
    pub access: Access,
    /// A file of the host's that is the image, instead of one in the run's directory.
    pub file: Option<PathBuf>,
}

/// What the image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// A raw file: byte for byte what the namespace holds.
    Raw,
    /// A network block device on a raw file whose server caches writes and forgets those that weren't flushed when
    /// it is killed.
    ForgetfulServer,
}

/// What a drive holds when the guest first sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeroes.
    Zeroes,
    /// An empty ext4 file system.
    Ext4,
}

/// A layer above the image.
#[derive(Clone, Debug, PartialEq)]
pub enum Layer {
    /// Fails requests.
    Faults(Vec<MediaFault>),
    /// Lets no more than so many requests a second through.
    IopsLimit(u32),
    /// Writes each write, flush and discard to a log, in order.
    LogWrites,
}

/// A request that fails with an I/O error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MediaFault {
    /// Which requests.
    pub on: FaultOn,
    /// Only those that touch this sector of 512 bytes.
    pub sector: Option<u64>,
    /// How often.
    pub times: FaultTimes,
}

/// Which requests fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOn {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
}

/// How often a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultTimes {
    /// The first time.
    Once,
    /// Each time.
    Always,
}

/// What a discard does to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discard {
    /// It gives the blocks back.
    Unmap,
    /// It is accepted and does nothing.
    Ignore,
}

/// How the image's file is accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Through the host's page cache.
    Cached,
    /// Past it, for measurements.
    Direct,
}

impl Drive {
    /// A drive of `size_mib` MiB on a raw file.
    #[must_use]
    pub fn new(name: &str, size_mib: u64) -> Self {
        Self {
            name: name.into(),
            size_bytes: size_mib << 20,
            image: Image::Raw,
            layers: Vec::new(),
            content: Content::Zeroes,
            discard: Discard::Unmap,
            access: Access::Cached,
            file: None,
        }
    }

    /// The same with `layer` above what it has.
    #[must_use]
    pub fn layer(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self
    }

    /// The file that holds its data, below the run's directory unless it is the host's.
    #[must_use]
    pub fn image_path(&self, run: &Path) -> PathBuf {
        self.file.clone().unwrap_or_else(|| run.join(format!("{}.img", self.name)))
    }

    /// The log of [`Layer::LogWrites`].
    #[must_use]
    pub fn log_path(&self, run: &Path) -> PathBuf {
        run.join(format!("{}.log", self.name))
    }

    /// The socket of [`Image::ForgetfulServer`].
    #[must_use]
    pub fn socket_path(&self, run: &Path) -> PathBuf {
        run.join(format!("{}.nbd", self.name))
    }

    /// The name of the throttle group of [`Layer::IopsLimit`], for changes while the guest runs.
    #[must_use]
    pub fn throttle_group(&self) -> String {
        format!("{}-group", self.name)
    }

    /// Creates the files, where they aren't there from an earlier boot of the same run.
    pub(crate) fn create(&self, run: &Path) -> Result<()> {
        let image = self.image_path(run);
        if !image.exists() {
            make(&image, self.size_bytes)?;
            if self.content == Content::Ext4 {
                let tool = packages::program("mke2fs", "e2fsprogs")?;
                command::output(
                    std::process::Command::new(tool).args(["-q", "-F", "-t", "ext4"]).arg(&image),
                )?;
            }
        }
        if self.layers.contains(&Layer::LogWrites) {
            // The log needs room for every write of the run; a sparse file costs what is written.
            make(&self.log_path(run), 16 * self.size_bytes + (1 << 30))?;
        }
        Ok(())
    }

    /// QEMU's arguments that make the drive, under the node name [`name`](Self::name).
    pub(crate) fn arguments(&self, run: &Path) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut below = self.ground(run, &mut arguments);
        for (level, layer) in self.layers.iter().enumerate() {
            let node = format!("{}-{level}", self.name);
            let mut description = match layer {
                Layer::Faults(faults) => json!({
                    "driver": "blkdebug", "image": below,
                    "inject-error": faults.iter().map(MediaFault::describe).collect::<Vec<_>>(),
                }),
                Layer::IopsLimit(iops) => {
                    let group = self.throttle_group();
                    let limits = json!({"iops-total": iops});
                    arguments.push("-object".into());
                    arguments.push(
                        json!({"qom-type": "throttle-group", "id": group, "limits": limits}).to_string(),
                    );
                    json!({"driver": "throttle", "file": below, "throttle-group": group})
                }
                Layer::LogWrites => {
                    let log = format!("{node}-log");
                    let file = json!({"driver": "file", "filename": self.log_path(run)});
                    push_node(&mut arguments, &log, file);
                    json!({"driver": "blklogwrites", "file": below, "log": log, "log-sector-size": 512})
                }
            };
            description["discard"] = self.discard.name().into();
            push_node(&mut arguments, &node, description);
            below = node;
        }
        let top = json!({"driver": "raw", "file": below, "discard": self.discard.name()});
        push_node(&mut arguments, &self.name, top);
        arguments
    }

    /// The nodes of the image itself; returns the topmost's name.
    fn ground(&self, run: &Path, arguments: &mut Vec<String>) -> String {
        let file = |path: PathBuf| {
            let mut file = json!({"driver": "file", "filename": path, "discard": self.discard.name()});
            if self.access == Access::Direct {
                file["cache"] = json!({"direct": true});
                file["aio"] = "io_uring".into();
            }
            file
        };
        let node = format!("{}-image", self.name);
        match self.image {
            Image::Raw => push_node(arguments, &node, file(self.image_path(run))),
            Image::ForgetfulServer => {
                let server = json!({"type": "unix", "path": self.socket_path(run)});
                push_node(arguments, &node, json!({"driver": "nbd", "server": server}));
            }
        }
        node
    }
}

impl MediaFault {
    fn describe(&self) -> Value {
        let on = match self.on {
            FaultOn::Read => "read",
            FaultOn::Write => "write",
            FaultOn::Flush => "flush",
        };
        let once = self.times == FaultTimes::Once;
        let mut fault = json!({"event": "none", "iotype": on, "errno": rustix::io::Errno::IO.raw_os_error(), "once": once});
        if let Some(sector) = self.sector {
            fault["sector"] = sector.into();
        }
        fault
    }
}

impl Discard {
    fn name(self) -> &'static str {
        match self {
            Self::Unmap => "unmap",
            Self::Ignore => "ignore",
        }
    }
}

fn push_node(arguments: &mut Vec<String>, name: &str, mut description: Value) {
    description["node-name"] = name.into();
    arguments.push("-blockdev".into());
    arguments.push(description.to_string());
}

fn make(path: &Path, len_bytes: u64) -> Result<()> {
    let file = File::create(path).map_err(LabError::io("create", path))?;
    file.set_len(len_bytes).map_err(LabError::io("size", path))
}
