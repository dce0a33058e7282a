//! URIs of emulated devices: `emu:BACKING?parameter=value&…`.
//!
//! ```text
//! emu:null?size=1TiB&lba=4096          moves no data
//! emu:ram?size=1GiB&lba=512&model=1    sparse memory, here with the power-loss model
//! emu:/var/lib/db.img?size=64GiB       an image file; size= creates it when it is missing
//! ```
//!
//! | parameter | value | default |
//! |---|---|---|
//! | `size` | bytes of each namespace, with k/M/G/T, KiB/MiB/GiB/TiB (all powers of 1024) | the image file's length |
//! | `lba` | logical block size: 512 or 4096 | 4096 |
//! | `ns` | number of namespaces | 1 |
//! | `mdts` | largest transfer: 0 (no limit), the exponent over 4 KiB pages (1–16), or a size from 8KiB | 1MiB |
//! | `queues` | I/O queue pairs granted at most | 64 |
//! | `entries` | entries of a queue at most | 1024 |
//! | `vwc` | volatile write cache, 0 or 1 | 1 |
//! | `latency_us` | modelled latency of every command, in microseconds | 0 |
//! | `read_latency_us`, `write_latency_us`, `flush_latency_us` | the same for one class | `latency_us` |
//! | `read_bps`, `write_bps` | bytes per second that data moves, written as a size with or without `/s`; 0 for no limit | 0 |
//! | `noiob` | optimal I/O boundary in blocks, 0 for none | 0 |
//! | `awupf` | blocks written atomically across a power failure, zero-based | 0 |
//! | `model` | power-loss model, 0 or 1 | 0 |
//! | `engine` | for files: `auto`, `uring`, `plain` | `auto` |
//! | `direct` | for files: `auto`, `on`, `off` (O_DIRECT) | `auto` |
//! | `serial` | serial number | `FOLIANT0` |
//!
//! A `?` or `%` inside a path is written `%3F` or `%25`. A file called `ram` or `null` is written `./ram`.

use std::time::Duration;

use crate::bandwidth::Bandwidth;
use crate::config::{
    Backing, ConfigError, Direct, EmulatedConfig, FileEngine, Latency, MDTS_LIMIT, NamespaceConfig,
    PAGE_BYTES_MIN,
};

const PARAMETERS: [&str; 19] = [
    "size",
    "lba",
    "ns",
    "mdts",
    "queues",
    "entries",
    "vwc",
    "latency_us",
    "read_latency_us",
    "write_latency_us",
    "flush_latency_us",
    "read_bps",
    "write_bps",
    "noiob",
    "awupf",
    "model",
    "engine",
    "direct",
    "serial",
];

impl EmulatedConfig {
    /// Reads the URI of an emulated device; the [module](crate::uri) lists the parameters.
    ///
    /// # Errors
    /// [`ConfigError`], which names the value, the limit and the remedy.
    pub fn parse_uri(uri: &str) -> Result<Self, ConfigError> {
        let not_emulated = || ConfigError::NotEmulated { uri: uri.to_owned() };
        let rest = uri.strip_prefix("emu:").ok_or_else(not_emulated)?;
        let (target, query) = rest.split_once('?').unwrap_or((rest, ""));
        if target.is_empty() {
            return Err(not_emulated());
        }
        let parameters = Parameters::parse(query)?;
        let config = parameters.into_config(target)?;
        config.validate()?;
        Ok(config)
    }
}

/// The parameters of one URI, each at most once and none unknown.
struct Parameters<'a> {
    given: Vec<(&'static str, &'a str)>,
}

impl<'a> Parameters<'a> {
    fn parse(query: &'a str) -> Result<Self, ConfigError> {
        let mut given: Vec<(&'static str, &'a str)> = Vec::new();
        for part in query.split('&').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            let known = PARAMETERS.iter().find(|known| **known == name);
            let Some(known) = known else {
                return Err(ConfigError::UnknownParameter {
                    name: name.to_owned(),
                    known: PARAMETERS.join(", "),
                });
            };
            if given.iter().any(|(earlier, _)| earlier == known) {
                return Err(ConfigError::RepeatedParameter { name: name.to_owned() });
            }
            given.push((known, value));
        }
        Ok(Self { given })
    }

    fn value(&self, name: &'static str) -> Option<&'a str> {
        self.given.iter().find(|(given, _)| *given == name).map(|(_, value)| *value)
    }

    /// The named parameter as a number from `min` to `max`, or `default`.
    fn number(&self, name: &'static str, default: u64, min: u64, max: u64) -> Result<u64, ConfigError> {
        let Some(value) = self.value(name) else { return Ok(default) };
        let number: u64 = value.parse().map_err(|_| ConfigError::Unreadable {
            name,
            value: value.to_owned(),
            expected: format!("a whole number from {min} to {max} is expected"),
        })?;
        if (min..=max).contains(&number) {
            Ok(number)
        } else {
            Err(ConfigError::OutOfRange { name, value: number, min, max })
        }
    }

    fn number_u16(&self, name: &'static str, default: u16, min: u16) -> Result<u16, ConfigError> {
        let number = self.number(name, default.into(), min.into(), u16::MAX.into())?;
        Ok(u16::try_from(number).unwrap_or(u16::MAX))
    }

    fn switch(&self, name: &'static str, default: bool) -> Result<bool, ConfigError> {
        Ok(self.number(name, default.into(), 0, 1)? == 1)
    }

    fn size(&self, name: &'static str) -> Result<Option<u64>, ConfigError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        parse_size(value).map(Some).ok_or_else(|| ConfigError::Unreadable {
            name,
            value: value.to_owned(),
            expected: "a size in bytes is expected, such as 1048576, 512k, 4KiB, 1GiB or 10G".to_owned(),
        })
    }

    /// The named parameter as bytes per second; 0, which sets no limit, where it isn't given.
    fn rate(&self, name: &'static str) -> Result<u64, ConfigError> {
        let Some(value) = self.value(name) else { return Ok(0) };
        parse_size(value.strip_suffix("/s").unwrap_or(value)).ok_or_else(|| ConfigError::Unreadable {
            name,
            value: value.to_owned(),
            expected: "bytes per second are expected, such as 200MB/s, 3GiB/s or 1048576; 0 for no limit"
                .to_owned(),
        })
    }

    fn duration_us(&self, name: &'static str, default: Duration) -> Result<Duration, ConfigError> {
        let default_us = u64::try_from(default.as_micros()).unwrap_or(u64::MAX);
        Ok(Duration::from_micros(self.number(name, default_us, 0, 60_000_000)?))
    }

    fn one_of<T: Copy>(
        &self,
        name: &'static str,
        default: T,
        choices: &[(&str, T)],
    ) -> Result<T, ConfigError> {
        let Some(value) = self.value(name) else { return Ok(default) };
        let choice = choices.iter().find(|(word, _)| *word == value);
        choice.map(|(_, choice)| *choice).ok_or_else(|| {
            let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
            ConfigError::Unreadable {
                name,
                value: value.to_owned(),
                expected: format!("one of {} is expected", words.join(", ")),
            }
        })
    }

    fn mdts(&self, default: u8) -> Result<u8, ConfigError> {
        let Some(bytes) = self.size("mdts")? else { return Ok(default) };
        if bytes <= MDTS_LIMIT.into() {
            return Ok(u8::try_from(bytes).unwrap_or(MDTS_LIMIT));
        }
        let bytes_max = PAGE_BYTES_MIN << MDTS_LIMIT;
        if !bytes.is_power_of_two() || bytes <= PAGE_BYTES_MIN || bytes > bytes_max {
            return Err(ConfigError::Unreadable {
                name: "mdts",
                value: self.value("mdts").unwrap_or_default().to_owned(),
                expected: format!(
                    "0 for no limit, an exponent from 1 to {MDTS_LIMIT}, or a power of two from 8KiB to 256MiB is expected"
                ),
            });
        }
        let exponent = bytes.trailing_zeros() - PAGE_BYTES_MIN.trailing_zeros();
        Ok(u8::try_from(exponent).unwrap_or(MDTS_LIMIT))
    }

    fn into_config(self, target: &str) -> Result<EmulatedConfig, ConfigError> {
        let block_bytes = self.number("lba", 4096, 0, u32::MAX.into())?;
        let namespace = NamespaceConfig {
            size_bytes: self.size("size")?,
            block_bytes: u32::try_from(block_bytes).unwrap_or(u32::MAX),
        };
        let namespaces = self.number("ns", 1, 1, 1024)?;
        let engines =
            [("auto", FileEngine::Auto), ("uring", FileEngine::IoUring), ("plain", FileEngine::Plain)];
        let engine = self.one_of("engine", FileEngine::Auto, &engines)?;
        let directs = [("auto", Direct::Auto), ("on", Direct::Always), ("off", Direct::Never)];
        let direct = self.one_of("direct", Direct::Auto, &directs)?;
        let backing = match target {
            "null" => Backing::Null,
            "ram" => Backing::Ram,
            path => Backing::File { path: decode_path(path)?.into(), direct, engine },
        };
        let is_file = matches!(backing, Backing::File { .. });
        if !is_file && (self.value("engine").is_some() || self.value("direct").is_some()) {
            return Err(ConfigError::Conflict {
                what: "engine= and direct= say how a file is read and written, and this device has none",
                remedy: "leave them out, or name a file: emu:PATH",
            });
        }

        let base = EmulatedConfig::null(0, 4096);
        let latency = self.duration_us("latency_us", Duration::ZERO)?;
        Ok(EmulatedConfig {
            backing,
            namespaces: vec![namespace; usize::try_from(namespaces).unwrap_or(usize::MAX)],
            mdts: self.mdts(base.mdts)?,
            queue_pairs_max: self.number_u16("queues", base.queue_pairs_max, 1)?,
            queue_entries_max: u32::try_from(self.number(
                "entries",
                base.queue_entries_max.into(),
                2,
                65_536,
            )?)
            .unwrap_or(u32::MAX),
            volatile_write_cache: self.switch("vwc", base.volatile_write_cache)?,
            latency: Latency {
                read: self.duration_us("read_latency_us", latency)?,
                write: self.duration_us("write_latency_us", latency)?,
                flush: self.duration_us("flush_latency_us", latency)?,
            },
            bandwidth: Bandwidth { read_bps: self.rate("read_bps")?, write_bps: self.rate("write_bps")? },
            noiob_blocks: self.number_u16("noiob", 0, 0)?,
            awupf_z: self.number_u16("awupf", 0, 0)?,
            power_loss_model: self.switch("model", false)?,
            serial: self.value("serial").map_or(base.serial, str::to_owned),
            clock: base.clock,
        })
    }
}

/// Reads a size: digits, then nothing, `B`, or one of k/M/G/T with an optional `B` or `iB`; all powers of 1024.
fn parse_size(text: &str) -> Option<u64> {
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    let number: u64 = digits.parse().ok()?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

/// Replaces `%XX` by the byte it stands for.
fn decode_path(path: &str) -> Result<String, ConfigError> {
    let unreadable = || ConfigError::Unreadable {
        name: "path",
        value: path.to_owned(),
        expected: "% starts a two-digit hexadecimal byte; write a literal % as %25".to_owned(),
    };
    let mut decoded = Vec::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let (Some(high), Some(low)) = (bytes.next(), bytes.next()) else { return Err(unreadable()) };
        let hex = |digit: u8| char::from(digit).to_digit(16);
        let (Some(high), Some(low)) = (hex(high), hex(low)) else { return Err(unreadable()) };
        decoded.push(u8::try_from(high * 16 + low).map_err(|_| unreadable())?);
    }
    String::from_utf8(decoded).map_err(|_| unreadable())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn refusal(uri: &str) -> String {
        EmulatedConfig::parse_uri(uri).expect_err(uri).to_string()
    }

    #[test]
    fn a_ram_uri_sets_every_field_it_names() {
        let config = EmulatedConfig::parse_uri(
            "emu:ram?size=10G&lba=512&ns=2&mdts=128KiB&queues=3&entries=64&vwc=0&latency_us=5&flush_latency_us=9\
             &write_bps=200MB/s&noiob=256&awupf=7&model=1&serial=ABC",
        )
        .unwrap();
        assert_eq!(config.backing, Backing::Ram);
        assert_eq!(config.namespaces, vec![NamespaceConfig::new(10 << 30, 512); 2]);
        assert_eq!((config.mdts, config.queue_pairs_max, config.queue_entries_max), (5, 3, 64));
        assert!(!config.volatile_write_cache);
        assert_eq!(config.latency.read, Duration::from_micros(5));
        assert_eq!(config.latency.flush, Duration::from_micros(9));
        assert_eq!(config.bandwidth, Bandwidth { read_bps: 0, write_bps: 200 << 20 });
        assert_eq!((config.noiob_blocks, config.awupf_z), (256, 7));
        assert!(config.power_loss_model);
        assert_eq!(config.serial, "ABC");
    }

    #[test]
    fn a_path_may_hold_encoded_characters() {
        let config = EmulatedConfig::parse_uri("emu:/tmp/a%3Fb%25.img?engine=plain&direct=off").unwrap();
        let Backing::File { path, direct, engine } = config.backing else { panic!("not a file") };
        assert_eq!(path, Path::new("/tmp/a?b%.img"));
        assert_eq!((direct, engine), (Direct::Never, FileEngine::Plain));
        assert_eq!(config.namespaces, vec![NamespaceConfig::whole_file(4096)]);
        assert!(refusal("emu:/tmp/a%zz").contains("%25"));
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        let sizes = [
            ("512", 512),
            ("4KiB", 4096),
            ("4k", 4096),
            ("3MB", 3 << 20),
            ("1GiB", 1 << 30),
            ("2T", 2 << 40),
        ];
        for (text, bytes) in sizes {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in ["", "k", "1.5G", "-1", "1GiBs", "99999999999999999999", "20000000T"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn refusals_name_value_limit_and_remedy() {
        let cases = [
            ("nvme:ram", "emu:ram"),
            ("emu:", "emu:PATH"),
            ("emu:ram?size=1G&lab=512", "known are size, lba, ns"),
            ("emu:ram?size=1G&size=2G", "given twice"),
            ("emu:ram", "add size="),
            ("emu:ram?size=big", "such as 1048576"),
            ("emu:ram?size=1G&lba=1024", "512 or 4096"),
            ("emu:ram?size=1000&lba=512", "nearest are 512 and 1024"),
            ("emu:ram?size=1G&queues=0", "1 to"),
            ("emu:ram?size=1G&entries=1", "2 to 65536"),
            ("emu:ram?size=1G&vwc=yes", "0 to 1"),
            ("emu:ram?size=1G&write_bps=fast", "such as 200MB/s"),
            ("emu:ram?size=1G&read_bps=2T/s", "0 to 1099511627776 are allowed"),
            ("emu:ram?size=1G&mdts=100k", "8KiB to 256MiB"),
            ("emu:ram?size=1G&engine=uring", "emu:PATH"),
            ("emu:x.img?engine=fast", "auto, uring, plain"),
            ("emu:x.img?model=1", "emu:ram"),
        ];
        for (uri, expected) in cases {
            let message = refusal(uri);
            assert!(message.contains(expected), "{uri}: {message}");
        }
    }

    #[test]
    fn mdts_is_an_exponent_or_a_size() {
        for (text, mdts) in [("0", 0), ("5", 5), ("8KiB", 1), ("1MiB", 8), ("256MiB", 16)] {
            let uri = format!("emu:null?size=1G&mdts={text}");
            assert_eq!(EmulatedConfig::parse_uri(&uri).unwrap().mdts, mdts, "{text}");
        }
    }
}
