//! The NVMe wire format, and nothing else: sized structs, bitfields and numbers under the specification's own
//! mnemonics.
//!
//! The crate holds no logic beyond naming bits, allocates nothing and needs no `std`. The driver and the
//! emulated controller both speak through it and share nothing else.
//!
//! # Sources
//! Sections and figures are those of the NVM Express Base Specification 2.1 ("Base"), the NVM Command Set
//! Specification 1.2 ("NVM") and the NVMe over PCIe Transport Specification 1.1 ("PCIe"); figures have other numbers in
//! other revisions. Each was compared with the text of its revision or, for the common command format, Create I/O
//! Queue and the doorbells, with independent citations of the same revision. A section alone is cited where the
//! figure's number could not be compared: PRP entries, namespace identifiers, the dwords of queue deletion and of
//! Number of Queues, and the Error Information and Firmware Slot logs.
//!
//! # Conventions
//! Two conventions hold throughout:
//!
//! - A field that counts from zero, where the value 0 means one, ends in `_z`; who adds the one says so by that.
//! - Every multi-byte integer is little-endian on the wire (Base section 1.4.3, figure 3), and the structs hold it in
//!   native order; the crate refuses to compile for a big-endian target.
//!
//! The bitfields of commands and completions mark their fields `#[inline]`: both sides use them for every I/O, and
//! a `const fn` of another crate isn't inlined otherwise.
//!
//! Read [`registers`] first, then [`command`] and [`completion`].

#![no_std]

#[cfg(target_endian = "big")]
compile_error!(
    "foliant-nvme-spec maps the wire format onto native integers and needs a little-endian target"
);

/// Declares a newtype over an integer whose known values have names and whose unknown values survive.
macro_rules! open_enum {
    (
        $(#[$meta:meta])*
        pub struct $name:ident($repr:ty) {
            $($(#[$vmeta:meta])* $value:ident = $number:expr, $text:expr;)*
        }
    ) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash,
            ::zerocopy::FromBytes, ::zerocopy::IntoBytes, ::zerocopy::Immutable, ::zerocopy::KnownLayout,
        )]
        #[repr(transparent)]
        pub struct $name(pub $repr);

        impl $name {
            $($(#[$vmeta])* pub const $value: Self = Self($number);)*

            /// The name the specification gives this value; `None` for a value without one here.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$value => Some($text),)*
                    _ => None,
                }
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "{:#x}", self.0),
                }
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self.name() {
                    Some(name) => write!(f, concat!(stringify!($name), "({:#x} {})"), self.0, name),
                    None => write!(f, concat!(stringify!($name), "({:#x})"), self.0),
                }
            }
        }
    };
}

pub mod command;
pub mod completion;
pub mod feature;
pub mod identify;
pub mod log;
pub mod opcode;
pub mod prp;
pub mod registers;
pub mod sgl;
pub mod status;

pub use command::Command;
pub use completion::Completion;
pub use opcode::{AdminOpcode, NvmOpcode};
pub use status::{Status, StatusCode};

/// The memory page size with CC.MPS = 0, in bytes: the only one this project runs a controller with
/// (Base section 3.1.4.5, figure 41). PRP entries, queues and identify data are all laid out in such pages.
pub const PAGE_BYTES: usize = 4096;

/// The namespace identifier that names all namespaces, or none in particular (Base section 3.2.1).
pub const NSID_ALL: u32 = 0xFFFF_FFFF;
