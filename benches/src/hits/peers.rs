//! The peers of the hit races, warm: a file in the page cache, and the cache crates.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result};
use memmap2::{Mmap, MmapMut, MmapOptions};

use crate::walk::PAGE;

/// A temporary file whose pages are all in the kernel's page cache and mapped.
pub struct WarmFile {
    pub file: File,
    map: Mmap,
    /// The name of the file system that it lies on.
    pub filesystem: String,
}

impl WarmFile {
    /// A file of `pages` pages in the directory for temporary files.
    pub fn new(pages: usize) -> Result<Self> {
        let mut file = tempfile::tempfile().context("cannot create a temporary file")?;
        for page in 0..pages {
            file.write_all(&[page as u8; PAGE]).context("cannot fill the temporary file")?;
        }
        // Clean pages: the kernel's own writeback shall not run beside the measurement.
        file.sync_all().context("cannot sync the temporary file")?;
        let filesystem = filesystem(&file)?;
        // SAFETY: the file is unlinked and private to this process, so nobody truncates it; it is changed through
        // `file` and `map_mut` only between and never during reads of a slice of this map.
        #[expect(unsafe_code, reason = "a file mapping is one of the peers")]
        let map =
            unsafe { MmapOptions::new().populate().map(&file) }.context("cannot map the temporary file")?;
        Ok(Self { file, map, filesystem })
    }

    /// The file's bytes, mapped for reading.
    pub fn map(&self) -> &[u8] {
        &self.map
    }

    /// A second mapping, for writing.
    pub fn map_mut(&self) -> Result<MmapMut> {
        // SAFETY: as for `map`; the caller lets no race read from `map` while it writes here.
        #[expect(unsafe_code, reason = "a file mapping is one of the peers")]
        let map = unsafe { MmapOptions::new().populate().map_mut(&self.file) };
        map.context("cannot map the temporary file for writing")
    }
}

/// Names the file systems that temporary files usually lie on (`linux/magic.h`).
fn filesystem(file: &File) -> Result<String> {
    let magic = rustix::fs::fstatfs(file).context("cannot ask for the file system's type")?.f_type;
    Ok(match magic {
        0xEF53 => "ext4".into(),
        0x0102_1994 => "tmpfs".into(),
        0x5846_5342 => "xfs".into(),
        0x9123_683E => "btrfs".into(),
        0x794C_7630 => "overlayfs".into(),
        other => format!("a file system of type {other:#x}"),
    })
}

/// The cache crates, each with every page in it. They share the pages, of which a get hands out a reference.
pub struct CacheCrates {
    pub quick: quick_cache::sync::Cache<u32, Arc<[u8]>>,
    pub foyer: foyer_memory::Cache<u32, Arc<[u8]>>,
    pub moka: moka::sync::Cache<u32, Arc<[u8]>>,
}

impl CacheCrates {
    /// Caches with four times the room they need, so that an uneven share of a segment evicts nothing.
    pub fn new(pages: u32) -> Self {
        let room = pages as usize * 4;
        let caches = Self {
            quick: quick_cache::sync::Cache::new(room),
            foyer: foyer_memory::CacheBuilder::new(room).build(),
            moka: moka::sync::Cache::new(room as u64),
        };
        for page in 0..pages {
            let bytes: Arc<[u8]> = vec![page as u8; PAGE].into();
            caches.quick.insert(page, bytes.clone());
            caches.foyer.insert(page, bytes.clone());
            caches.moka.insert(page, bytes);
        }
        caches.moka.run_pending_tasks();
        caches
    }
}
