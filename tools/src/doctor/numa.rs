//! NUMA: which nodes there are, on which one each controller is, and whether processors set aside for shards are near it.

use super::Subject;
use super::boot::with_words;
use super::finding::Finding;
use super::processors::{CPUS, cpu_numbers};

const AREA: &str = "NUMA";
const NODES: &str = "sys/devices/system/node";
/// How many processors are proposed: a shard each.
const PROPOSED_CPUS: usize = 2;

/// A node with what it has.
struct Node {
    number: u32,
    cpus: Vec<u32>,
    /// As the kernel writes them.
    cpu_list: String,
}

pub(super) fn check(subject: &Subject<'_>) -> Vec<Finding> {
    let nodes = nodes(subject);
    if nodes.len() < 2 {
        return vec![Finding::fine(
            AREA,
            "one node: all processors and all memory are as near to any device",
        )];
    }
    let of_nodes = nodes.iter().map(|node| describe(subject, node));
    let of_controllers = subject.controllers.iter().map(|function| {
        let address = function.address.to_string();
        match function.numa_node {
            None => unknown(&address),
            Some(number) => near(subject, &address, number, &nodes),
        }
    });
    of_nodes.chain(of_controllers).collect()
}

fn nodes(subject: &Subject<'_>) -> Vec<Node> {
    let node = |name: String| {
        let number = name.strip_prefix("node")?.parse().ok()?;
        let cpu_list = subject.text(format!("{NODES}/{name}/cpulist")).unwrap_or_default();
        Some(Node { number, cpus: cpu_numbers(&cpu_list), cpu_list })
    };
    let mut nodes: Vec<Node> = subject.names(NODES).into_iter().filter_map(node).collect();
    nodes.sort_by_key(|node| node.number);
    nodes
}

fn describe(subject: &Subject<'_>, node: &Node) -> Finding {
    let directory = format!("{NODES}/node{}/hugepages", node.number);
    let pools = subject.names(&directory).into_iter().filter_map(|pool| {
        let page = pool.strip_prefix("hugepages-")?.to_owned();
        let pages = |name: &str| subject.text(format!("{directory}/{pool}/{name}"));
        Some(format!("{} of {} hugepages of {page} free", pages("free_hugepages")?, pages("nr_hugepages")?))
    });
    let pools: Vec<String> = pools.collect();
    let cpus = match &node.cpu_list[..] {
        "" => "no processors".to_owned(),
        list => format!("processors {list}"),
    };
    let says: Vec<String> = std::iter::once(cpus).chain(pools).collect();
    Finding::fine(AREA, format!("node {}: {}", node.number, says.join(", ")))
}

fn unknown(address: &str) -> Finding {
    let says = format!(
        "the firmware doesn't say on which node {address} is, so shards and their memory can't be put there. The board's \
         manual tells which slot belongs to which processor; then, after each boot, with that node's number:"
    );
    Finding::slows(AREA, says).run(format!("echo 0 > /sys/bus/pci/devices/{address}/numa_node"))
}

fn near(subject: &Subject<'_>, address: &str, number: u32, nodes: &[Node]) -> Finding {
    let Some(node) = nodes.iter().find(|node| node.number == number && !node.cpus.is_empty()) else {
        let says = format!("{address} is on node {number}, which has no processors: shards run on others");
        return Finding::fine(AREA, says);
    };
    let isolated = cpu_numbers(&subject.text(format!("{CPUS}/isolated")).unwrap_or_default());
    let is_near = |cpu: &u32| node.cpus.contains(cpu);
    if isolated.is_empty() || isolated.iter().any(is_near) {
        let says = format!(
            "{address} is on node {number}: ShardThreads::NearDevice pins shards to processors {}, with their memory there",
            node.cpu_list
        );
        return Finding::fine(AREA, says);
    }
    let proposed = &node.cpus[node.cpus.len().saturating_sub(PROPOSED_CPUS)..];
    let cpus = proposed.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let isolated = isolated.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let says = format!(
        "{address} is on node {number}, and the processors set aside for shards ({isolated}) are all on others, from where \
         each access crosses between nodes. Set some of its own aside instead:"
    );
    with_words(
        subject,
        Finding::slows(AREA, says),
        &format!("isolcpus={cpus} nohz_full={cpus} rcu_nocbs={cpus}"),
    )
}
