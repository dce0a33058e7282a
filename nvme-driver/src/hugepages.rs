//! What the system says about its hugepages.

/// Size of the system's default hugepage in bytes; `None` where `/proc/meminfo` names none.
///
/// `hugepage-rs` panics on such a system, so nobody calls it without having asked here.
pub(crate) fn page_bytes() -> Option<usize> {
    parse(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// Finds `Hugepagesize:    2048 kB` in the text of `/proc/meminfo`.
fn parse(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("Hugepagesize:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024).filter(|bytes| bytes.is_power_of_two())
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn the_hugepage_size_is_read_from_its_line() {
        assert_eq!(parse("HugePages_Free:  0\nHugepagesize:       2048 kB\n"), Some(2 << 20));
    }

    #[test]
    fn a_system_without_hugepages_has_no_size() {
        assert_eq!(parse("MemTotal:  1 kB\n"), None);
        assert_eq!(parse("Hugepagesize:       kB\n"), None);
        assert_eq!(parse("Hugepagesize:       3 kB\n"), None);
    }
}
