//! Transactions of a database on the engine, and what must be left of them after a power loss: the guest carries them
//! out, the host looks at what the medium kept.
//!
//! Each transaction goes into redb on the first half of a namespace, and into plain pages of the second half, which the
//! engine's own `sync` makes durable. It counts as acknowledged when both have returned; the next begins after that.

use std::error::Error;

use foliant::redb_storage::MappingBackend;
use foliant::{Engine, Mapping, MappingOptions};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::marked;

const ROWS: TableDefinition<(u64, u32), &[u8]> = TableDefinition::new("rows");
const COUNT: TableDefinition<&str, u64> = TableDefinition::new("count");
/// Rows of a transaction, and the size of each.
const ROWS_EACH: u32 = 5;
const ROW_BYTES: usize = 3000;
/// Pages of a transaction: one that every transaction overwrites, and these of its own.
const PAGES_EACH: u64 = 3;
const PAGE: u64 = foliant::PAGE_BYTES as u64;

/// A result with any error.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The database and the pages, on an open engine.
pub struct Transactions {
    database: Database,
    pages: Mapping,
}

impl Transactions {
    /// Opens what is on namespace `nsid`, of `size_bytes` bytes; on an empty one, makes it.
    ///
    /// # Errors
    /// The engine's, or redb's: a database that can't be opened after a power loss is one that lost something.
    pub fn open(engine: &Engine, nsid: u32, size_bytes: u64) -> Result<Self> {
        let half = size_bytes / 2;
        let part = |start_bytes| {
            engine.mapping(&MappingOptions {
                namespace: nsid,
                start_bytes,
                len_bytes: Some(half),
                ..Default::default()
            })
        };
        let backend = MappingBackend::open(part(0)?)?;
        let database = Database::builder().set_cache_size(1 << 20).create_with_backend(backend)?;
        Ok(Self { database, pages: part(half)? })
    }

    /// Carries transaction `number` out, from 1 on. When it returns, it is acknowledged.
    ///
    /// # Errors
    /// The engine's, or redb's.
    pub fn commit(&self, number: u64) -> Result<()> {
        let write = self.database.begin_write()?;
        {
            let mut rows = write.open_table(ROWS)?;
            for row in 0..ROWS_EACH {
                rows.insert((number, row), &*row_bytes(number, row))?;
            }
            write.open_table(COUNT)?.insert("transactions", number)?;
        }
        write.commit()?;
        for page in std::iter::once(0).chain(own_pages(number)) {
            self.pages.write_at(page * PAGE, &page_bytes(number, page))?;
        }
        self.pages.sync()?;
        Ok(())
    }

    /// Checks that every transaction up to `acknowledged` is there, whole, that those up to `begun` are there whole or
    /// (in redb) not at all, and that there are no others.
    ///
    /// # Errors
    /// What is missing or wrong.
    pub fn check(&mut self, acknowledged: u64, begun: u64) -> Result<()> {
        if !self.database.check_integrity()? {
            return Err("redb had to repair itself though it had been opened".into());
        }
        let count = self.check_rows(begun)?;
        if count < acknowledged {
            return Err(format!("redb has {count} transactions, and {acknowledged} were acknowledged").into());
        }
        self.check_pages(acknowledged, begun)
    }

    /// Checks redb's part, and returns how many transactions it has.
    fn check_rows(&self, begun: u64) -> Result<u64> {
        let read = self.database.begin_read()?;
        let rows = match read.open_table(ROWS) {
            Ok(rows) => rows,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        let count = read.open_table(COUNT)?.get("transactions")?.map_or(0, |count| count.value());
        if count > begun {
            return Err(format!("redb has {count} transactions, and only {begun} had begun").into());
        }
        for number in 1..=count {
            for row in 0..ROWS_EACH {
                let found = rows.get((number, row))?;
                if found.is_none_or(|found| found.value() != row_bytes(number, row)) {
                    return Err(format!("row {row} of transaction {number} is missing or wrong").into());
                }
            }
        }
        if rows.iter()?.count() as u64 != count * u64::from(ROWS_EACH) {
            return Err("there are rows of no transaction".into());
        }
        Ok(count)
    }

    fn check_pages(&self, acknowledged: u64, begun: u64) -> Result<()> {
        let mut bytes = vec![0; PAGE as usize];
        for number in 1..=acknowledged {
            for page in own_pages(number) {
                self.pages.read_at(page * PAGE, &mut bytes)?;
                if bytes != page_bytes(number, page) {
                    return Err(format!("page {page} of transaction {number} is missing or wrong").into());
                }
            }
        }
        if acknowledged == 0 {
            return Ok(());
        }
        self.pages.read_at(0, &mut bytes)?;
        // Blocks of it may be the next transaction's already: a page isn't written as a whole.
        for (block, offset) in bytes.chunks(512).zip((0..).step_by(512)) {
            let number = marked::number_of(offset, block)?.unwrap_or(0);
            if !(acknowledged..=begun).contains(&number) {
                return Err(format!(
                    "the page that all transactions write holds {number} at byte {offset}, and {acknowledged} were \
                     acknowledged, {begun} had begun"
                )
                .into());
            }
        }
        Ok(())
    }
}

fn own_pages(number: u64) -> impl Iterator<Item = u64> {
    // Apart from each other, so that they are commands of their own.
    (0..PAGES_EACH).map(move |page| number * 2 * PAGES_EACH + 2 * page)
}

fn page_bytes(number: u64, page: u64) -> Vec<u8> {
    marked::bytes(number, page * PAGE, PAGE as usize)
}

fn row_bytes(number: u64, row: u32) -> Vec<u8> {
    marked::bytes(number, u64::from(row) << 32, ROW_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use foliant::{EngineOptions, Hugepages};

    #[test]
    fn acknowledged_transactions_are_found_and_later_ones_missed() {
        let options =
            EngineOptions { cache_bytes: 2 << 20, hugepages: Hugepages::Never, ..Default::default() };
        let engine = Engine::open("emu:ram?size=16MiB&lba=4096", &options).unwrap();
        let mut transactions = Transactions::open(&engine, 1, 16 << 20).unwrap();
        transactions.check(0, 0).unwrap();
        for number in 1..=3 {
            transactions.commit(number).unwrap();
        }
        transactions.check(3, 3).unwrap();
        transactions.check(2, 4).unwrap();
        assert!(transactions.check(4, 4).unwrap_err().to_string().contains("redb has 3"));
        assert!(transactions.check(2, 2).unwrap_err().to_string().contains("only 2 had begun"));
        transactions.pages.write_at(512, &marked::bytes(2, 512, 512)).unwrap();
        assert!(transactions.check(3, 3).unwrap_err().to_string().contains("holds 2 at byte 512"));
        transactions.pages.write_at(512, &marked::bytes(3, 512, 512)).unwrap();
        transactions.pages.write_at(own_pages(2).next().unwrap() * PAGE, &[0; 8]).unwrap();
        assert!(transactions.check(3, 3).unwrap_err().to_string().contains("transaction 2"));
    }
}
