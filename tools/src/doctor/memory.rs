//! Hugepages on the right NUMA node, transparent hugepages, and how much memory the user may lock.

use super::Subject;
use super::boot::with_words;
use super::finding::{Finding, Severity};
use crate::size::ByteSize;

const HUGEPAGES: &str = "hugepages";
const LOCKED: &str = "locked memory";
/// What queues and the lists of their commands take beside the cache, generously.
const BESIDE_CACHE_BYTES: u64 = 16 << 20;
/// The largest hugepages of x86-64, in the kernel's words.
const LARGEST_PAGE: (ByteSize, &str) = (ByteSize(1 << 30), "1G");
/// CAP_IPC_LOCK: whoever has it locks as much as there is.
const CAP_IPC_LOCK: u32 = 14;

/// What the arena takes, cache and queues.
fn arena(subject: &Subject<'_>) -> ByteSize {
    ByteSize(subject.cache.0.saturating_add(BESIDE_CACHE_BYTES))
}

pub(super) fn check_hugepages(subject: &Subject<'_>) -> Vec<Finding> {
    let meminfo = subject.text("proc/meminfo").unwrap_or_default();
    let Some(page_kib) = kib_of(&meminfo, "Hugepagesize:").filter(|kib| *kib > 0) else {
        return vec![shortfall(
            subject,
            "this kernel has none (CONFIG_HUGETLBFS); the cache lies on ordinary pages",
        )];
    };
    let mut nodes: Vec<u32> = subject.controllers.iter().filter_map(|function| function.numa_node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    // Without a place for the device any node is as good as another.
    let pools: Vec<Pool> = if nodes.is_empty() || nodes.len() > 1 && !subject.is_one_asked_for {
        vec![Pool::of_machine(page_kib)]
    } else {
        nodes.into_iter().map(|node| Pool::of_node(node, page_kib)).collect()
    };
    pools.iter().map(|pool| pool.check(subject, page_kib, &meminfo)).collect()
}

/// Hugepages of one size, of the machine or of one node.
struct Pool {
    place: String,
    directory: String,
}

impl Pool {
    fn of_machine(page_kib: u64) -> Self {
        let directory = format!("sys/kernel/mm/hugepages/hugepages-{page_kib}kB");
        Self { place: "this machine".to_owned(), directory }
    }

    fn of_node(node: u32, page_kib: u64) -> Self {
        let directory = format!("sys/devices/system/node/node{node}/hugepages/hugepages-{page_kib}kB");
        Self { place: format!("NUMA node {node}, the device's"), directory }
    }

    fn check(&self, subject: &Subject<'_>, page_kib: u64, meminfo: &str) -> Finding {
        let pages =
            |name: &str| -> Option<u64> { subject.text(format!("{}/{name}", self.directory))?.parse().ok() };
        let (reserved, free) = (pages("nr_hugepages").unwrap_or(0), pages("free_hugepages").unwrap_or(0));
        let page = ByteSize(page_kib << 10);
        let wanted = arena(subject).0.div_ceil(page.0);
        let place = &self.place;
        if subject.uses_noiommu() && wanted > 1 && page < LARGEST_PAGE.0 {
            return one_stretch(subject, page);
        }
        if free >= wanted {
            return Finding::fine(HUGEPAGES, format!("{free} of {page} free on {place}, {wanted} wanted"));
        }
        let says = format!("{free} of {page} free on {place}, where cache and queues want {wanted}");
        let missing = ByteSize((wanted - free).saturating_mul(page.0));
        let available =
            ByteSize(kib_of(meminfo, "MemAvailable:").unwrap_or(u64::MAX >> 10).saturating_mul(1024));
        if missing > available {
            return shortfall(
                subject,
                format!("{says}; only {available} of memory is available: choose a smaller cache (--cache)"),
            );
        }
        let total = reserved + wanted - free;
        shortfall(subject, says).run(format!("echo {total} > /{}/nr_hugepages", self.directory)).run(format!(
            "echo vm.nr_hugepages={total} > /etc/sysctl.d/90-foliant.conf   # after the next boot as well"
        ))
    }
}

/// Without an IOMMU the device sees physical addresses, and hugepages that are neighbours can't be counted on.
fn one_stretch(subject: &Subject<'_>, page: ByteSize) -> Finding {
    let (largest, words) = LARGEST_PAGE;
    let count = arena(subject).0.div_ceil(largest.0);
    let says = format!(
        "without an IOMMU cache and queues ({}) must lie in one physical stretch, and those of {page} seldom are \
         neighbours: reserve larger ones at boot, and choose a cache that fits into one",
        arena(subject)
    );
    let words = format!("default_hugepagesz={words} hugepagesz={words} hugepages={count}");
    with_words(subject, Finding::blocks(HUGEPAGES, says), &words)
}

/// Without hugepages the cache lies on ordinary pages, which costs speed; without an IOMMU they are a must, since a
/// device then sees memory by its physical address.
fn shortfall(subject: &Subject<'_>, says: impl Into<String>) -> Finding {
    let severity = if subject.uses_noiommu() { Severity::Blocks } else { Severity::Slows };
    Finding::new(HUGEPAGES, severity, says)
}

/// The number of KiB in a line of meminfo.
fn kib_of(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

pub(super) fn check_transparent(subject: &Subject<'_>) -> Vec<Finding> {
    const SWITCH: &str = "sys/kernel/mm/transparent_hugepage/enabled";
    let chosen = subject.text(SWITCH).and_then(|text| {
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    });
    let finding = match chosen.as_deref() {
        Some("never") => {
            Finding::slows(HUGEPAGES, "transparent ones are off; page headers and look-up tables want them")
                .run(format!("echo madvise > /{SWITCH}"))
        }
        Some(chosen) => {
            Finding::fine(HUGEPAGES, format!("transparent ones for headers and tables: {chosen}"))
        }
        None => Finding::fine(
            HUGEPAGES,
            "this kernel has no transparent ones, which headers and tables would use",
        ),
    };
    vec![finding]
}

pub(super) fn check_locked(subject: &Subject<'_>) -> Vec<Finding> {
    let (user, wanted) = (&subject.account.name, arena(subject));
    let limit = match limit_of(subject) {
        Limit::None(why) => return vec![Finding::fine(LOCKED, format!("{user}: no limit, {why}"))],
        Limit::Bytes(bytes) if bytes >= wanted => {
            return vec![Finding::fine(LOCKED, format!("{user} may lock {bytes}, {wanted} wanted"))];
        }
        Limit::Unknown => {
            let says = format!(
                "how much {user} may lock can't be seen from here, since no process of that user runs; it must be \
                 {wanted} at least"
            );
            return vec![Finding::slows(LOCKED, says).run(format!("su - {user} -c 'ulimit -l'   # in KiB"))];
        }
        Limit::Bytes(bytes) => bytes,
    };
    let says = format!(
        "{user} may lock {limit}, and all memory that a device reaches counts: {wanted}. Only root and holders of \
         CAP_IPC_LOCK aren't bound. Then log in anew; a systemd service needs LimitMEMLOCK=infinity in its unit \
         instead"
    );
    let file = "/etc/security/limits.d/90-foliant.conf";
    vec![Finding::blocks(LOCKED, says).run(format!("echo '{user} - memlock unlimited' > {file}"))]
}

enum Limit {
    None(&'static str),
    Bytes(ByteSize),
    Unknown,
}

fn limit_of(subject: &Subject<'_>) -> Limit {
    if subject.is_own_account {
        if has_ipc_lock(&subject.text("proc/self/status").unwrap_or_default()) {
            return Limit::None("it has CAP_IPC_LOCK");
        }
        return locked_limit(&subject.text("proc/self/limits").unwrap_or_default()).unwrap_or(Limit::Unknown);
    }
    if subject.account.is_root() {
        return Limit::None("root has CAP_IPC_LOCK");
    }
    // Another user's limit is that of a process of that user.
    let of_user = |process: &String| {
        let status = subject.text(format!("proc/{process}/status"))?;
        let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        let is_theirs = ids.split_whitespace().next()?.parse() == Ok(subject.account.user_id);
        is_theirs.then(|| subject.text(format!("proc/{process}/limits"))).flatten()
    };
    let processes =
        subject.names("proc").into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    let limits = processes.collect::<Vec<_>>().iter().find_map(of_user);
    limits.and_then(|limits| locked_limit(&limits)).unwrap_or(Limit::Unknown)
}

/// `Max locked memory         8388608              8388608              bytes`: the soft limit comes first.
fn locked_limit(limits: &str) -> Option<Limit> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(Limit::None("as its limits say")),
        bytes => Some(Limit::Bytes(ByteSize(bytes.parse().ok()?))),
    }
}

fn has_ipc_lock(status: &str) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = effective.and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok()).unwrap_or(0);
    set >> CAP_IPC_LOCK & 1 == 1
}
