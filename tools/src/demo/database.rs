//! The demo's database: one transaction for each file taken in.
//!
//! | table | key | value |
//! |---|---|---|
//! | `documents` | transaction | path, length in bytes, CRC-64/NVME of the content |
//! | `chunks` | transaction, index from 0 | 16 KiB of the content, the last chunk what's left |

use std::collections::BTreeSet;

use crc_fast::{CrcAlgorithm, checksum};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use super::ledger::{Ledger, Standing, TransactionId};
use super::sources::Source;
use crate::error::Error;

const DOCUMENTS: TableDefinition<TransactionId, (&str, u64, u64)> = TableDefinition::new("documents");
const CHUNKS: TableDefinition<(TransactionId, u32), &[u8]> = TableDefinition::new("chunks");
const CHUNK_BYTES: usize = 16 << 10;
/// Failures that are described; one is bad enough.
const DESCRIBED_MAX: usize = 10;

/// Creates the tables, so that a reader always finds them.
pub(crate) fn create_tables(database: &Database) -> Result<(), redb::Error> {
    let write = database.begin_write()?;
    write.open_table(DOCUMENTS)?;
    write.open_table(CHUNKS)?;
    Ok(write.commit()?)
}

/// Puts a source into a transaction.
pub(crate) fn insert(
    write: &mut WriteTransaction,
    id: TransactionId,
    source: &Source,
) -> Result<(), redb::Error> {
    write.set_durability(Durability::Immediate)?;
    let crc = checksum(CrcAlgorithm::Crc64Nvme, &source.bytes);
    let document = (&*source.path, source.bytes.len() as u64, crc);
    write.open_table(DOCUMENTS)?.insert(id, document)?;
    let mut chunks = write.open_table(CHUNKS)?;
    for (index, chunk) in (0..).zip(source.bytes.chunks(CHUNK_BYTES)) {
        chunks.insert((id, index), chunk)?;
    }
    Ok(())
}

/// What a look at the whole database found.
#[derive(Debug, Default)]
pub(crate) struct Verified {
    /// Promised transactions that are there byte for byte.
    pub(crate) promised: u64,
    /// Transactions that are there whole though their commit never returned.
    pub(crate) found: BTreeSet<TransactionId>,
    /// Transactions that were begun, not acknowledged, and are not there.
    pub(crate) absent: u64,
    /// Content compared.
    pub(crate) bytes: u64,
    /// What is wrong, the first few.
    pub(crate) failures: Vec<String>,
}

impl Verified {
    fn fail(&mut self, failure: String) {
        if self.failures.len() < DESCRIBED_MAX {
            self.failures.push(failure);
        }
    }
}

/// Compares the whole database with the ledger and the sources.
pub(crate) fn verify(database: &Database, ledger: &Ledger, sources: &[Source]) -> Result<Verified, Error> {
    let mut verified = Verified::default();
    let read = database.begin_read().map_err(Error::redb("beginning to read"))?;
    let documents = read.open_table(DOCUMENTS).map_err(Error::redb("opening the table of documents"))?;
    let chunks = read.open_table(CHUNKS).map_err(Error::redb("opening the table of chunks"))?;
    let mut expected = ledger.entries();
    for document in documents.iter().map_err(Error::redb("listing documents"))? {
        let (id, document) = document.map_err(Error::redb("reading a document"))?;
        let (id, (path, len_bytes, crc)) = (id.value(), document.value());
        let Some(entry) = expected.remove(&id) else {
            verified.fail(format!("transaction {id} ({path}) is there, but was lost or never begun"));
            continue;
        };
        let source = &sources[entry.source];
        let content = content(&chunks, id)
            .map_err(|source| Error::Redb { what: "reading chunks", source: Box::new(source) })?;
        let is_whole = path == source.path
            && content == source.bytes
            && len_bytes == content.len() as u64
            && crc == checksum(CrcAlgorithm::Crc64Nvme, &content);
        match (is_whole, entry.standing) {
            (true, Standing::Promised) => verified.promised += 1,
            (true, Standing::Begun) => drop(verified.found.insert(id)),
            (false, _) => verified.fail(format!("transaction {id} ({path}) is there, but not whole")),
        }
        verified.bytes += content.len() as u64;
    }
    for (id, entry) in expected {
        let path = &sources[entry.source].path;
        match entry.standing {
            Standing::Promised => {
                verified.fail(format!("transaction {id} ({path}) was acknowledged, but is not there"));
            }
            Standing::Begun if content(&chunks, id).is_ok_and(|content| !content.is_empty()) => {
                verified
                    .fail(format!("transaction {id} ({path}) is there by half: chunks without a document"));
            }
            Standing::Begun => verified.absent += 1,
        }
    }
    Ok(verified)
}

/// All chunks of a transaction, joined.
fn content(
    chunks: &impl ReadableTable<(TransactionId, u32), &'static [u8]>,
    id: TransactionId,
) -> Result<Vec<u8>, redb::Error> {
    let mut content = Vec::new();
    for chunk in chunks.range((id, 0)..=(id, u32::MAX))? {
        content.extend_from_slice(chunk?.1.value());
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use redb::backends::InMemoryBackend;

    fn sources() -> Vec<Source> {
        let source = |path: &str, len| Source { path: path.to_owned(), bytes: vec![7; len] };
        vec![source("empty", 0), source("chunk", CHUNK_BYTES), source("more", 2 * CHUNK_BYTES + 1)]
    }

    fn database() -> Database {
        let database = Database::builder().create_with_backend(InMemoryBackend::new()).unwrap();
        create_tables(&database).unwrap();
        database
    }

    fn commit(database: &Database, id: TransactionId, source: &Source) {
        let mut write = database.begin_write().unwrap();
        insert(&mut write, id, source).unwrap();
        write.commit().unwrap();
    }

    #[test]
    fn what_was_committed_is_verified_byte_for_byte() {
        let (sources, database, ledger) = (sources(), database(), Ledger::new(0..3));
        while let Some((id, source)) = ledger.take() {
            commit(&database, id, &sources[source]);
            ledger.acknowledge(id);
        }
        let verified = verify(&database, &ledger, &sources).unwrap();
        assert_eq!((verified.promised, verified.absent), (3, 0));
        assert_eq!(verified.bytes, 3 * CHUNK_BYTES as u64 + 1);
        assert!(verified.failures.is_empty(), "{:?}", verified.failures);
    }

    #[test]
    fn an_acknowledged_transaction_that_is_missing_is_a_failure() {
        let ledger = Ledger::new([1]);
        let (id, _) = ledger.take().unwrap();
        assert_eq!(verify(&database(), &ledger, &sources()).unwrap().absent, 1);
        ledger.acknowledge(id);
        let verified = verify(&database(), &ledger, &sources()).unwrap();
        assert!(verified.failures[0].contains("acknowledged, but is not there"), "{:?}", verified.failures);
    }

    #[test]
    fn a_transaction_that_was_lost_must_not_come_back() {
        let (sources, database, ledger) = (sources(), database(), Ledger::new([1]));
        let (id, source) = ledger.take().unwrap();
        ledger.settle(|_| false);
        commit(&database, id, &sources[source]);
        let verified = verify(&database, &ledger, &sources).unwrap();
        assert!(verified.failures[0].contains("was lost or never begun"), "{:?}", verified.failures);
    }

    #[test]
    fn a_transaction_that_is_not_whole_is_a_failure() {
        let (sources, database, ledger) = (sources(), database(), Ledger::new([2]));
        let (id, source) = ledger.take().unwrap();
        commit(&database, id, &sources[source]);
        let write = database.begin_write().unwrap();
        write.open_table(CHUNKS).unwrap().remove((id, 1)).unwrap();
        write.commit().unwrap();
        let verified = verify(&database, &ledger, &sources).unwrap();
        assert!(verified.failures[0].contains("not whole"), "{:?}", verified.failures);
    }
}
