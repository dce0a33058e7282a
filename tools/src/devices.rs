//! `foliant devices`: the NVMe controllers of this machine, and who uses them.

use foliant_nvme_pci::{Host, PciFunction, Usage};
use serde::Serialize;

use crate::cli::DevicesOptions;
use crate::columns::Columns;
use crate::error::Error;
use crate::size::ByteSize;
use crate::stdout::{Format, Report, write_report};
use crate::table::Table;
use crate::verdict::Verdict;

pub(crate) fn run(options: &DevicesOptions) -> Result<Verdict, Error> {
    write_report(&list(&Host::live())?, Format::of(options.json))?;
    Ok(Verdict::Passed)
}

#[derive(Debug, Serialize)]
struct Listing {
    controllers: Vec<Listed>,
}

#[derive(Debug, Serialize)]
struct Listed {
    address: String,
    vendor_id: u16,
    device_id: u16,
    /// What the kernel's driver knows; `None` while another driver has the controller.
    model: Option<String>,
    serial: Option<String>,
    firmware: Option<String>,
    size_bytes: Option<ByteSize>,
    namespaces: Vec<ListedNamespace>,
    driver: Option<String>,
    iommu_group: Option<u32>,
    noiommu: bool,
    numa_node: Option<u32>,
    used_by: Vec<String>,
    /// What couldn't be looked at.
    cannot_tell: Vec<String>,
}

#[derive(Debug, Serialize)]
struct ListedNamespace {
    id: u32,
    name: String,
    size_bytes: ByteSize,
    block_bytes: u32,
}

fn list(host: &Host) -> Result<Listing, Error> {
    let mut controllers = Vec::new();
    for function in host.nvme_functions()? {
        let usage = host.usage(&function)?;
        controllers.push(Listed::new(function, &usage));
    }
    Ok(Listing { controllers })
}

impl Listed {
    fn new(function: PciFunction, usage: &Usage) -> Self {
        let kernel = function.kernel.as_ref();
        let namespaces: Vec<ListedNamespace> = kernel
            .into_iter()
            .flat_map(|controller| &controller.namespaces)
            .map(|namespace| ListedNamespace {
                id: namespace.id,
                name: namespace.name.clone(),
                size_bytes: ByteSize(namespace.size_bytes),
                block_bytes: namespace.block_bytes,
            })
            .collect();
        Self {
            address: function.address.to_string(),
            vendor_id: function.vendor,
            device_id: function.device,
            model: kernel.map(|controller| controller.model.clone()),
            serial: kernel.map(|controller| controller.serial.clone()),
            firmware: kernel.map(|controller| controller.firmware.clone()),
            size_bytes: kernel
                .map(|_| ByteSize(namespaces.iter().map(|namespace| namespace.size_bytes.0).sum())),
            namespaces,
            driver: function.driver,
            iommu_group: function.iommu_group,
            noiommu: function.noiommu,
            numa_node: function.numa_node,
            used_by: usage.uses.iter().map(ToString::to_string).collect(),
            cannot_tell: usage.doubts.iter().map(ToString::to_string).collect(),
        }
    }

    /// The cells of a row but the last, which says who uses it and may take several lines.
    fn cells(&self) -> Vec<String> {
        let unknown = || "-".to_owned();
        let number = |number: Option<u32>| number.map_or_else(unknown, |number| number.to_string());
        let namespaces: Vec<String> =
            self.namespaces.iter().map(|namespace| namespace.name.clone()).collect();
        vec![
            self.address.clone(),
            self.model.clone().unwrap_or_else(|| format!("{:04x}:{:04x}", self.vendor_id, self.device_id)),
            self.size_bytes.map_or_else(unknown, |size| size.to_string()),
            if namespaces.is_empty() { unknown() } else { namespaces.join(" ") },
            self.driver.clone().unwrap_or_else(unknown),
            match (self.iommu_group, self.noiommu) {
                (Some(group), true) => format!("{group} (no IOMMU)"),
                (group, _) => number(group),
            },
            number(self.numa_node),
        ]
    }

    fn users(&self) -> Vec<String> {
        let doubts = self.cannot_tell.iter().map(|doubt| format!("can't tell: {doubt}"));
        let users: Vec<String> = self.used_by.iter().cloned().chain(doubts).collect();
        if users.is_empty() { vec!["nobody".to_owned()] } else { users }
    }
}

impl Report for Listing {
    fn table(&self) -> Table {
        if self.controllers.is_empty() {
            return Table::default().section(
                "This machine shows no NVMe controllers; `foliant doctor` explains what is missing.",
            );
        }
        let mut columns = Columns::new(&[
            "ADDRESS",
            "MODEL",
            "SIZE",
            "NAMESPACES",
            "DRIVER",
            "IOMMU GROUP",
            "NUMA NODE",
            "USED BY",
        ]);
        for listed in &self.controllers {
            let mut cells = listed.cells();
            for user in listed.users() {
                let empty = vec![String::new(); cells.len()];
                columns.row(std::mem::replace(&mut cells, empty).into_iter().chain([user]));
            }
        }
        let table = Table::default().section("NVMe controllers");
        columns.lines().into_iter().fold(table, Table::line)
    }
}

#[cfg(test)]
mod tests {
    use foliant_nvme_pci::fake::{FakeFunction, FakeHost};

    use super::*;

    fn host_with_two() -> FakeHost {
        let fake = FakeHost::new();
        fake.function(FakeFunction::NVME);
        fake.controller("0000:01:00.0", "nvme0");
        fake.namespace("nvme0", "nvme0n1", "259:0");
        fake.namespace("nvme0", "nvme0n2", "259:1");
        let bound = FakeFunction {
            address: "0000:02:00.0",
            driver: Some("vfio-pci"),
            group: Some(13),
            numa_node: -1,
            ..FakeFunction::NVME
        };
        fake.function(bound);
        fake
    }

    #[test]
    fn each_controller_has_a_row_and_each_further_user_a_line() {
        let fake = host_with_two();
        fake.mount("259:0", "/dev/nvme0n1", "/data");
        fake.append("proc/swaps", "/dev/nvme0n2 partition 1000 0 -2\n");
        let text = list(&fake.host()).unwrap().table().to_string();
        let words: Vec<Vec<&str>> =
            text.lines().map(|line| line.split("  ").filter(|cell| !cell.is_empty()).collect()).collect();
        let trimmed: Vec<Vec<&str>> =
            words.into_iter().map(|row| row.into_iter().map(str::trim).collect()).collect();
        assert_eq!(
            trimmed[2],
            [
                "0000:01:00.0",
                "Fake SSD 9000",
                "2 GiB",
                "nvme0n1 nvme0n2",
                "nvme",
                "12",
                "0",
                "nvme0n2 is swap"
            ]
        );
        assert_eq!(trimmed[3], ["nvme0n1 is mounted at /data"]);
        assert_eq!(trimmed[4], ["0000:02:00.0", "144d:a80a", "-", "-", "vfio-pci", "13", "-", "nobody"]);
    }

    #[test]
    fn json_says_what_the_table_says() {
        let fake = host_with_two();
        fake.link("proc/self/ns/pid", "pid:[1]");
        let json = serde_json::to_value(list(&fake.host()).unwrap()).unwrap();
        let [first, second] = &json["controllers"].as_array().unwrap()[..] else { panic!("{json:#}") };
        assert_eq!((&first["size_bytes"], &first["driver"]), (&(2u64 << 30).into(), &"nvme".into()));
        assert_eq!(first["namespaces"][1]["name"], "nvme0n2");
        assert!(first["cannot_tell"][0].as_str().unwrap().contains("run this as root"), "{first:#}");
        assert_eq!((&second["model"], &second["iommu_group"]), (&serde_json::Value::Null, &13.into()));
    }

    #[test]
    fn a_machine_without_controllers_is_told_where_to_go_on() {
        let text = list(&FakeHost::new().host()).unwrap().table().to_string();
        assert!(text.contains("no NVMe controllers") && text.contains("foliant doctor"), "{text}");
    }
}
