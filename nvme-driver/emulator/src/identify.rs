//! What Identify tells about this controller and its namespaces (Base section 5.1.13, NVM section 4.1.5).

use foliant_nvme_spec::identify::{
    Controller, Dlfeat, EntrySize, LbaFormat, Namespace as IdentifyNamespace, NamespaceList, Nsfeat, Oncs,
    Vwc,
};
use foliant_nvme_spec::{Command, Completion};
use zerocopy::FromZeros;
use zerocopy::little_endian::U128;

use crate::config::{Backing, EmulatedConfig};
use crate::io::{Limits, Namespace};
use crate::log::{ERROR_ENTRIES, EVENT_REQUESTS};
use crate::registers::VERSION;

/// Firmware revision, as Identify and the firmware log give it.
pub(crate) const FIRMWARE: &[u8; 8] = b"1.0     ";
const MODEL: &[u8] = b"Foliant Emulated NVMe Controller";
/// Vendor QEMU and Red Hat use for virtual devices; there is none of our own.
const VENDOR: u16 = 0x1B36;
/// Outstanding Abort commands allowed; each completes at once.
const ABORTS: u8 = 4;

/// The Identify Controller structure.
pub(crate) fn controller(config: &EmulatedConfig, limits: &Limits) -> Controller {
    let mut data = Controller::new_zeroed();
    data.vid = VENDOR;
    data.ssvid = VENDOR;
    fill_padded(&mut data.sn, config.serial.as_bytes());
    fill_padded(&mut data.mn, MODEL);
    data.fr = *FIRMWARE;
    data.mdts = config.mdts;
    data.ver = VERSION;
    data.cntrltype = 1;
    data.acl_z = ABORTS - 1;
    data.aerl_z = EVENT_REQUESTS as u8 - 1;
    // One firmware slot, read only; no reset needed to activate.
    data.frmw = 0b11;
    // Get Log Page takes extended lengths and offsets.
    data.lpa = 0b100;
    data.elpe_z = (ERROR_ENTRIES - 1) as u8;
    data.wctemp = 343;
    data.cctemp = 353;
    let capacity: u64 = limits.namespaces.iter().map(|namespace| namespace.extent().len_bytes).sum();
    data.tnvmcap = U128::new(capacity.into());
    data.sqes = EntrySize::new().with_min(Command::SIZE_EXPONENT).with_max(Command::SIZE_EXPONENT);
    data.cqes = EntrySize::new().with_min(Completion::SIZE_EXPONENT).with_max(Completion::SIZE_EXPONENT);
    data.nn = limits.namespaces.len() as u32;
    data.oncs = Oncs::new().with_dataset_management(true).with_write_zeroes(true);
    data.vwc = Vwc::new().with_present(config.volatile_write_cache).with_flush_all(0b11);
    data.awun_z = config.awupf_z;
    data.awupf_z = config.awupf_z;
    let name = format!("nqn.2026-01.dev.foliant:emulated:{}", config.serial);
    let len = name.len().min(data.subnqn.len() - 1);
    data.subnqn[..len].copy_from_slice(&name.as_bytes()[..len]);
    data
}

/// The Identify Namespace structure.
pub(crate) fn namespace(config: &EmulatedConfig, namespace: &Namespace, nsid: u32) -> IdentifyNamespace {
    let mut data = IdentifyNamespace::new_zeroed();
    data.nsze = namespace.blocks;
    data.ncap = namespace.blocks;
    data.nuse = namespace.blocks;
    // An image file is sparse: the file system may run full before the namespace does.
    data.nsfeat = Nsfeat::new().with_thinp(matches!(config.backing, Backing::File { .. }));
    data.dlfeat = Dlfeat::new().with_read_behaviour(0b001).with_write_zeroes_deallocates(true);
    if config.awupf_z > 0 {
        // Units are aligned, so their boundaries are atomic boundaries, and a longer write is as many atomic
        // operations as it touches units (multiple atomicity mode).
        data.nsfeat = data.nsfeat.with_nsabp(true).with_mam(true);
        data.nawun_z = config.awupf_z;
        data.nawupf_z = config.awupf_z;
        data.nabsn_z = config.awupf_z;
        data.nabspf_z = config.awupf_z;
    }
    data.noiob = config.noiob_blocks;
    data.nvmcap = U128::new(namespace.extent().len_bytes.into());
    data.nguid = nguid(config, nsid);
    data.lbaf[0] = LbaFormat::new().with_lbads(namespace.block_bytes.trailing_zeros() as u8);
    data
}

/// The identifiers greater than `after`, ascending.
pub(crate) fn active_namespaces(limits: &Limits, after: u32) -> NamespaceList {
    let mut list = NamespaceList::new_zeroed();
    let active = 1..=limits.namespaces.len() as u32;
    for (entry, nsid) in list.nsid.iter_mut().zip(active.filter(|nsid| *nsid > after)) {
        *entry = nsid;
    }
    list
}

/// The Namespace Identification Descriptor list (Base section 5.1.13.2.3): one NGUID descriptor.
pub(crate) fn descriptors(config: &EmulatedConfig, nsid: u32) -> [u8; 4096] {
    const NIDT_NGUID: u8 = 2;
    let mut list = [0; 4096];
    let id = nguid(config, nsid);
    list[0] = NIDT_NGUID;
    list[1] = id.len() as u8;
    list[4..4 + id.len()].copy_from_slice(&id);
    list
}

/// An identifier that is the same for the same serial number and namespace: the serial number's FNV-1a hash, then
/// the namespace id.
fn nguid(config: &EmulatedConfig, nsid: u32) -> [u8; 16] {
    let hash = config
        .serial
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3));
    let mut id = [0; 16];
    id[..8].copy_from_slice(&hash.to_be_bytes());
    id[12..].copy_from_slice(&nsid.to_be_bytes());
    id
}

/// Copies ASCII and pads with spaces.
fn fill_padded(field: &mut [u8], text: &[u8]) {
    field.fill(b' ');
    let len = text.len().min(field.len());
    field[..len].copy_from_slice(&text[..len]);
}
