//! Attempts that are repeated because others write at the same time.

use std::collections::BTreeSet;
use std::mem;

use crate::netfilter::Family;

use super::outcome::{HostState, Steps};

/// Steps, and the state that they start from.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// The steps to apply.
    pub steps: Steps,
    /// The observed state before them.
    pub before: HostState,
}

/// The part of an attempt that was applied.
#[derive(Debug, Default)]
pub struct Applied {
    /// The families whose rules were written.
    pub families: BTreeSet<Family>,
    /// The number of side effects that were applied.
    pub effects: usize,
}

impl Applied {
    fn of(&self, mut steps: Steps) -> Steps {
        steps
            .changes
            .retain(|change| self.families.contains(&change.family));
        steps.effects.truncate(self.effects);
        steps
    }
}

/// The attempts after the first, and what was applied of each.
#[derive(Debug, Default)]
pub struct RetryLog {
    /// The attempts after the first.
    pub further: Vec<Attempt>,
    /// The part that was applied, of every attempt but the last.
    pub applied: Vec<Applied>,
}

impl RetryLog {
    /// Merges all attempts: the initial state, and every step that was applied
    /// or is part of the last attempt. Also returns the last attempt, if it is
    /// not the first.
    #[must_use]
    pub fn merge(self, first: Attempt) -> (Attempt, Option<Attempt>) {
        let last = self.further.last().cloned();
        let mut merged = first;
        let (mut changes, mut effects) = (Vec::new(), Vec::new());
        for (next, applied) in self.further.into_iter().zip(&self.applied) {
            let mut earlier = applied.of(mem::replace(&mut merged.steps, next.steps));
            changes.append(&mut earlier.changes);
            effects.append(&mut earlier.effects);
        }
        merged.steps.changes.splice(..0, changes);
        merged.steps.effects.splice(..0, effects);
        (merged, last)
    }
}

/// Returns true if the rules of one family read like neither state: somebody
/// else has written.
#[must_use]
pub fn somebody_else_wrote(before: &HostState, after: &HostState, now: &HostState) -> bool {
    let is_foreign =
        |family: &Family| !reads_like(before, now, *family) && !reads_like(after, now, *family);
    now.rules.keys().any(is_foreign)
}

/// Returns true if both states have the same rules of the family, at any place.
#[must_use]
pub fn reads_like(then: &HostState, now: &HostState, family: Family) -> bool {
    let rules = then.rules.get(&family).zip(now.rules.get(&family));
    rules.is_some_and(|(then, now)| then.reads_like(now))
}
