//! Whether processors run at full speed, and whether some are set aside for polling.

use super::Subject;
use super::boot::with_words;
use super::finding::Finding;

const AREA: &str = "processors";
pub(super) const CPUS: &str = "sys/devices/system/cpu";
/// With fewer there is none to spare.
const ISOLATION_CPUS_MIN: usize = 4;
/// How many are proposed: a shard each.
const ISOLATION_CPUS: usize = 2;

pub(super) fn check(subject: &Subject<'_>) -> Vec<Finding> {
    vec![governor(subject), isolation(subject)]
}

fn governor(subject: &Subject<'_>) -> Finding {
    let governors: Vec<String> = subject
        .names(CPUS)
        .iter()
        .filter_map(|cpu| subject.text(format!("{CPUS}/{cpu}/cpufreq/scaling_governor")))
        .collect();
    let slow: Vec<&String> = governors.iter().filter(|governor| *governor != "performance").collect();
    match slow.first() {
        None if governors.is_empty() => {
            Finding::fine(AREA, "the kernel doesn't govern their speed here, as in most virtual machines")
        }
        None => Finding::fine(AREA, "all governed for performance"),
        Some(first) => Finding::slows(
            AREA,
            format!(
                "{} of {} have the governor {first}, which slows short requests",
                slow.len(),
                governors.len()
            ),
        )
        .run(format!("echo performance | tee /{CPUS}/cpu*/cpufreq/scaling_governor")),
    }
}

fn isolation(subject: &Subject<'_>) -> Finding {
    let list = |name: &str| subject.text(format!("{CPUS}/{name}")).filter(|list| list.as_str() != "(null)");
    let isolated = list("isolated").unwrap_or_default();
    let tickless = list("nohz_full").unwrap_or_default();
    if !isolated.is_empty() {
        let ticks = if tickless.is_empty() {
            "; the timer still interrupts them (nohz_full)".to_owned()
        } else {
            format!(", without timer: {tickless}")
        };
        return Finding::fine(AREA, format!("set aside for shards: {isolated}{ticks}"));
    }
    let online = cpu_numbers(&list("online").unwrap_or_default());
    if online.len() < ISOLATION_CPUS_MIN {
        return Finding::fine(
            AREA,
            format!("{} of them, too few to set any aside for polling", online.len()),
        );
    }
    let near_device = subject
        .controllers
        .first()
        .and_then(|function| subject.text(format!("sys/bus/pci/devices/{}/local_cpulist", function.address)));
    let near = cpu_numbers(&near_device.unwrap_or_default());
    let pool = if near.len() >= ISOLATION_CPUS_MIN { &near } else { &online };
    let chosen: Vec<String> = pool[pool.len() - ISOLATION_CPUS..].iter().map(ToString::to_string).collect();
    let cpus = chosen.join(",");
    let finding = Finding::slows(
        AREA,
        "none is set aside: other work on a shard's processor shows in the slowest requests. Two near the device, to \
         which shards can be pinned:",
    );
    with_words(subject, finding, &format!("isolcpus={cpus} nohz_full={cpus} rcu_nocbs={cpus}"))
}

/// The numbers of a list such as `0-3,8`.
pub(super) fn cpu_numbers(list: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse::<u32>().ok()?..=last.trim().parse::<u32>().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::cpu_numbers;

    #[test]
    fn lists_of_processors_are_read() {
        assert_eq!(cpu_numbers("0-3,8,10-11"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(cpu_numbers(""), [] as [u32; 0]);
        assert_eq!(cpu_numbers("5"), [5]);
    }
}
