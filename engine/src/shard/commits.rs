//! A shard's commits: the Flushes of its namespaces, each for everybody who waits (WB-21, WB-29, WB-30).

use std::sync::Arc;

use foliant_nvme::{CommandError, Io, Namespace};

use super::Shard;
use super::open::OpenMapping;
use super::payload::{PayloadKind, ShardPayload};
use super::retry::{self, backoff_ns};
use crate::reply::{Grants, SlotId};
use crate::stats::bump;
use crate::writeback::commit::{CommitGroup, CommitStep, Durability};
use crate::writeback::events;

/// The commits of one namespace that meet in this shard.
#[derive(Debug)]
pub(super) struct NamespaceCommits {
    pub group: CommitGroup,
    pub namespace: Namespace,
    pub durability: Arc<Durability>,
}

impl Shard {
    pub(super) fn begin_commit(&mut self, slot: SlotId, open: &OpenMapping) {
        match open.durability.check() {
            Err(error) => self.answer(slot, Err(error)),
            Ok(()) => self.commits_of(open).group.join(slot),
        }
    }

    /// The writes of an expiry round have ended: commits what no later Flush has covered (WB-21).
    pub(super) fn commit_expired(&mut self) {
        for at in 0..self.open.len() {
            let Ok(mapping) = self.mapping(self.open[at].slot) else { continue };
            if !mapping.durability.is_settled() && mapping.durability.check().is_ok() {
                self.commits_of(&mapping).group.want();
            }
            self.want_mirror_commit(&mapping);
        }
    }

    fn commits_of(&mut self, open: &OpenMapping) -> &mut NamespaceCommits {
        let namespace = &open.shape.namespace;
        let known = self.commits.iter().position(|commits| commits.namespace.id() == namespace.id());
        let at = known.unwrap_or_else(|| {
            let (namespace, durability) = (namespace.clone(), open.durability.clone());
            self.commits.push(NamespaceCommits { group: CommitGroup::default(), namespace, durability });
            self.commits.len() - 1
        });
        &mut self.commits[at]
    }

    /// When a Flush that was put off is due.
    pub(super) fn commits_due_ns(&self) -> Option<u64> {
        self.commits.iter().filter_map(|commits| commits.group.due_ns()).min()
    }

    /// Submits the flushes that are due. They come last in a step: whatever completed before is covered.
    pub(super) fn step_commits(&mut self) {
        if self.commits.is_empty() {
            return;
        }
        let mut commits = std::mem::take(&mut self.commits);
        for NamespaceCommits { group, namespace, durability } in &mut commits {
            match group.step(durability, self.now_ns) {
                CommitStep::Idle => {}
                CommitStep::Settled => {
                    for slot in group.settled() {
                        bump(&self.link.counters.commits_shared, 1);
                        self.answer(slot, Ok(Grants::none()));
                    }
                }
                CommitStep::Flush { epoch } => {
                    if self.queue.free_commands() == 0 {
                        self.reads_yield = true;
                        continue;
                    }
                    let payload = ShardPayload::new(
                        PayloadKind::Flush { namespace: namespace.id(), epoch },
                        &self.watch,
                    );
                    match self.queue.submit(namespace, Io::Flush, payload) {
                        Ok(()) => {
                            let joined = group.submitted();
                            events::initiate_commit(
                                self.link.shard,
                                namespace.id(),
                                epoch,
                                joined,
                                self.now_ns,
                            );
                            bump(&self.link.counters.flush_commands, 1);
                            bump(&self.link.counters.commits_shared, joined.saturating_sub(1));
                            self.watch.submitted();
                        }
                        Err(rejected) => self.fail(&format!("a flush was refused: {}", rejected.reason)),
                    }
                }
            }
        }
        // Nothing joins while the groups are out: requests are taken in another part of the step.
        self.commits = commits;
    }

    /// A flush ended.
    pub(super) fn flush_completed(&mut self, namespace: u32, epoch: u64, result: Result<(), CommandError>) {
        events::commit_done(self.link.shard, namespace, epoch, &result, self.now_ns);
        let mut all = std::mem::take(&mut self.commits);
        if let Some(commits) = all.iter_mut().find(|commits| commits.namespace.id() == namespace) {
            let NamespaceCommits { group, durability, .. } = commits;
            if let Err(error) = result
                && retry::may_retry_flush(error, group.failures())
            {
                bump(&self.link.counters.command_retries, 1);
                group.put_off(self.now_ns.saturating_add(backoff_ns(group.failures())));
            } else {
                for slot in group.ended(epoch, result, durability) {
                    self.answer(slot, durability.check().map(|()| Grants::none()));
                }
            }
            if durability.check().is_err() {
                for slot in group.settled() {
                    self.answer(slot, durability.check().map(|()| Grants::none()));
                }
            }
        }
        self.commits = all;
    }
}
