//! Where shards run and where their memory lies, on a machine with several NUMA nodes.
//!
//! A shard's frames and tables belong on the node of the core that polls it: a hit elsewhere crosses the interconnect. A
//! shard whose core isn't known beforehand has them on the device's node, so that the device's writes at least don't cross
//! it. On a machine with one node nothing is asked and nothing changed.
//!
//! All of it is a preference. A node without free memory makes things slower, and keeps nothing from opening.

use std::path::Path;

use foliant_nvme::NodePart;

use crate::options::ShardThreads;

/// The processors of each node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Topology {
    /// By node number: those that have processors.
    nodes: Vec<(u32, Vec<usize>)>,
}

impl Topology {
    /// This machine's.
    pub(crate) fn live() -> Self {
        Self::read(Path::new("/sys/devices/system/node"))
    }

    /// As sysfs shows it below `directory`; no nodes where it doesn't.
    fn read(directory: &Path) -> Self {
        let node_of = |name: &str| name.strip_prefix("node")?.parse().ok();
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        let mut nodes: Vec<(u32, Vec<usize>)> = entries
            .filter_map(|entry| {
                let node = node_of(entry.file_name().to_str()?)?;
                let list = std::fs::read_to_string(entry.path().join("cpulist")).ok()?;
                let cores = cores_of(list.trim());
                (!cores.is_empty()).then_some((node, cores))
            })
            .collect();
        nodes.sort();
        Self { nodes }
    }

    /// Whether memory is as near to every processor.
    fn is_uniform(&self) -> bool {
        self.nodes.len() < 2
    }

    fn node_of(&self, core: usize) -> Option<u32> {
        self.nodes.iter().find(|(_, cores)| cores.contains(&core)).map(|(node, _)| *node)
    }
}

/// The numbers of a list such as `0-3,8`.
fn cores_of(list: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<usize>().ok()?..=last.trim().parse::<usize>().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

/// Where each shard runs, and where its memory lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placement {
    /// By shard; none where the system places the threads, or there are none.
    cores: Option<Vec<usize>>,
    /// By shard; none where it doesn't matter, or nobody knows.
    nodes: Vec<Option<u32>>,
}

impl Placement {
    /// For `shards` shards of a device on `device_node`, in a process that may run on the cores `allowed`.
    pub(crate) fn new(
        threads: &ShardThreads,
        shards: usize,
        device_node: Option<u32>,
        allowed: &[usize],
        topology: &Topology,
    ) -> Self {
        let cores = match threads {
            ShardThreads::Pinned(cores) => Some(cores.clone()),
            ShardThreads::NearDevice => Some(near(device_node, allowed, topology)),
            ShardThreads::Floating | ShardThreads::Manual => None,
        };
        let node = |shard: usize| match &cores {
            _ if topology.is_uniform() => None,
            Some(cores) => cores.get(shard).and_then(|core| topology.node_of(*core)),
            None => device_node,
        };
        Self { nodes: (0..shards).map(node).collect(), cores }
    }

    /// The core that a shard's thread is pinned to.
    pub(crate) fn core(&self, shard: usize) -> Option<usize> {
        self.cores.as_ref()?.get(shard).copied()
    }

    /// The parts of an arena in which shard after shard has `bytes` bytes of frames.
    pub(crate) fn parts(&self, bytes: usize) -> Vec<NodePart> {
        let part = |(shard, node): (usize, &Option<u32>)| {
            Some(NodePart { bytes: shard * bytes..(shard + 1) * bytes, node: (*node)? })
        };
        self.nodes.iter().enumerate().filter_map(part).collect()
    }

    /// From now until the answer is dropped, this thread takes new memory from a shard's node.
    pub(crate) fn prefer(&self, shard: usize) -> Option<policy::Preferred> {
        policy::Preferred::node((*self.nodes.get(shard)?)?)
    }
}

/// The cores nearest to the device: those of its node, then all others.
fn near(device_node: Option<u32>, allowed: &[usize], topology: &Topology) -> Vec<usize> {
    let mut cores = allowed.to_vec();
    cores.sort_unstable();
    cores.sort_by_key(|core| {
        let node = topology.node_of(*core);
        (device_node.is_some() && node != device_node, node)
    });
    cores
}

/// The memory policy of a thread.
mod policy {
    use libc::{c_int, c_long, c_ulong};
    use std::marker::PhantomData;
    use std::ptr::null_mut;

    /// Bits of a mask of nodes; the kernel has at most 1,024 (`MAX_NUMNODES`).
    const NODES_MAX: usize = 1024;
    const WORD_BITS: usize = c_ulong::BITS as usize;
    /// `MPOL_PREFERRED` of `linux/mempolicy.h`.
    const PREFERRED: c_int = 1;

    type Mask = [c_ulong; NODES_MAX / WORD_BITS];

    /// A thread's preference for a node; dropped, what was before is so again.
    #[derive(Debug)]
    pub(crate) struct Preferred {
        before: (c_int, Mask),
        /// It belongs to the thread.
        thread: PhantomData<*const ()>,
    }

    impl Preferred {
        /// `None` where the kernel refuses: memory then comes from wherever it likes.
        pub(super) fn node(node: u32) -> Option<Self> {
            let (mut mode, mut mask): (c_int, Mask) = (0, [0; NODES_MAX / WORD_BITS]);
            // SAFETY: both pointers are to locals that are as large as the call is told.
            #[expect(unsafe_code, reason = "a call of the kernel for which there is no wrapper")]
            let known = unsafe {
                let (mode, mask) = (&raw mut mode, mask.as_mut_ptr());
                libc::syscall(libc::SYS_get_mempolicy, mode, mask, NODES_MAX, null_mut::<u8>(), 0)
            };
            let mut wanted: Mask = [0; NODES_MAX / WORD_BITS];
            *wanted.get_mut(node as usize / WORD_BITS)? = 1 << (node as usize % WORD_BITS);
            let is_set = known == 0 && set(PREFERRED, &wanted) == 0;
            is_set.then_some(Self { before: (mode, mask), thread: PhantomData })
        }
    }

    impl Drop for Preferred {
        fn drop(&mut self) {
            let (mode, mask) = &self.before;
            if set(*mode, mask) != 0 {
                let error = std::io::Error::last_os_error();
                tracing::warn!(%error, "a thread's memory policy could not be set back");
            }
        }
    }

    fn set(mode: c_int, mask: &Mask) -> c_long {
        let is_empty = mask.iter().all(|word| *word == 0);
        let (mask, bits) = if is_empty { (null_mut(), 0) } else { (mask.as_ptr().cast_mut(), NODES_MAX + 1) };
        // SAFETY: the mask has the bits that the call is told of (the kernel takes one less than `maxnode`), or is null.
        #[expect(unsafe_code, reason = "a call of the kernel for which there is no wrapper")]
        unsafe {
            libc::syscall(libc::SYS_set_mempolicy, mode, mask, bits)
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// A machine of two nodes with four processors each, as sysfs shows it.
    fn two_nodes() -> Topology {
        let place = tempfile::tempdir().unwrap();
        for (node, list) in
            [("node0", "0-1,4-5\n"), ("node1", "2-3,6-7\n"), ("node2", "\n"), ("online", "0-2\n")]
        {
            std::fs::create_dir(place.path().join(node)).unwrap();
            std::fs::write(place.path().join(node).join("cpulist"), list).unwrap();
        }
        Topology::read(place.path())
    }

    fn one_node() -> Topology {
        Topology { nodes: vec![(0, (0..8).collect())] }
    }

    const ALL: [usize; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

    #[test]
    fn nodes_are_read_with_their_processors_and_those_without_are_left_out() {
        let expected = vec![(0, vec![0, 1, 4, 5]), (1, vec![2, 3, 6, 7])];
        assert_eq!(two_nodes(), Topology { nodes: expected });
        assert_eq!(Topology::read(Path::new("/not/there")), Topology::default());
    }

    #[test]
    fn a_pinned_shard_has_its_memory_on_the_node_of_its_core() {
        let threads = ShardThreads::Pinned(vec![6, 0, 3]);
        let placement = Placement::new(&threads, 3, Some(0), &ALL, &two_nodes());
        assert_eq!(placement.nodes, [Some(1), Some(0), Some(1)]);
        let parts = placement.parts(100);
        assert_eq!(parts[1], NodePart { bytes: 100..200, node: 0 });
        assert_eq!(
            (0..4).map(|shard| placement.core(shard)).collect::<Vec<_>>(),
            [Some(6), Some(0), Some(3), None]
        );
    }

    #[test]
    fn shards_near_the_device_fill_its_node_before_others() {
        let near = |device, shards| {
            let placement = Placement::new(&ShardThreads::NearDevice, shards, device, &ALL, &two_nodes());
            (0..shards).map(|shard| placement.core(shard).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(near(Some(1), 2), [2, 3]);
        assert_eq!(near(Some(1), 6), [2, 3, 6, 7, 0, 1]);
        assert_eq!(near(Some(0), 5), [0, 1, 4, 5, 2]);
        assert_eq!(near(None, 5), [0, 1, 4, 5, 2]);
        let allowed = [7, 0, 5];
        let placement = Placement::new(&ShardThreads::NearDevice, 3, Some(1), &allowed, &two_nodes());
        assert_eq!(placement.cores, Some(vec![7, 0, 5]));
        assert_eq!(placement.nodes, [Some(1), Some(0), Some(0)]);
    }

    #[test]
    fn shards_whose_threads_float_have_their_memory_on_the_devices_node() {
        for threads in [ShardThreads::Floating, ShardThreads::Manual] {
            let placement = Placement::new(&threads, 2, Some(1), &ALL, &two_nodes());
            assert_eq!((placement.cores.as_ref(), &placement.nodes[..]), (None, &[Some(1), Some(1)][..]));
            let unknown = Placement::new(&threads, 2, None, &ALL, &two_nodes());
            assert!(unknown.parts(100).is_empty() && unknown.prefer(0).is_none());
        }
    }

    #[test]
    fn on_a_machine_with_one_node_nothing_is_asked_of_the_kernel() {
        for threads in [ShardThreads::Floating, ShardThreads::NearDevice, ShardThreads::Pinned(vec![1, 2])] {
            for topology in [one_node(), Topology::default()] {
                let placement = Placement::new(&threads, 2, Some(0), &ALL, &topology);
                assert!(placement.parts(100).is_empty() && placement.prefer(1).is_none(), "{threads:?}");
            }
        }
    }

    #[test]
    fn a_threads_policy_is_what_it_was_when_its_memory_is_there() {
        // Node 0 is everywhere where there are nodes; without any, or in a sandbox, there is nothing to prefer.
        let policy = || std::fs::read_to_string("/proc/thread-self/numa_maps").unwrap_or_default();
        let is_preferring = |maps: &str| maps.lines().any(|line| line.split(' ').nth(1) == Some("prefer:0"));
        let before = policy();
        if let Some(preferred) = policy::Preferred::node(0) {
            assert!(is_preferring(&policy()), "mappings without a policy show their thread's");
            drop(preferred);
        }
        assert_eq!(is_preferring(&policy()), is_preferring(&before));
        assert!(policy::Preferred::node(5000).is_none());
    }
}
