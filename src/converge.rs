//! Brings the host to what is planned: read, compare, stop or write, read
//! again, and undo when that does not show what was planned.

use std::collections::BTreeMap;
use std::thread;

use anyhow::Result;

use crate::change::{Change, applied};
use crate::diff;
use crate::host::{Host, Look, Scope, Variant};
use crate::net::Family;
use crate::plan::Plan;
use crate::request::{Request, Wanted};
use crate::restore;
use crate::ruleset::Ruleset;

/// What a balancer owns on a host, by family.
pub type State = BTreeMap<Family, Ruleset>;

/// Whether changes are made or only foretold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Made.
    Apply,
    /// Foretold.
    Check,
}

/// What came of a run that could read the host.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which iptables was worked on.
    pub variant: Variant,
    /// What was there.
    pub before: State,
    /// What is there now, or in a check what would be.
    pub after: State,
    /// What was changed, or in a check what would be, in order. After a
    /// failure that was undone there is none.
    pub changes: Vec<Change>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Why it failed, and in what state the host is.
    pub failure: Option<String>,
}

impl Outcome {
    /// The version of iptables, as far as a dump has named it.
    #[must_use]
    pub fn version(&self) -> Option<&str> {
        let mut states = self.after.values().chain(self.before.values());
        states.find_map(|ruleset| ruleset.version.as_deref())
    }
}

/// Does what the request asks for.
///
/// # Errors
/// When the host cannot be read. Nothing has been changed then; what fails
/// later is in the [`Outcome`].
pub fn converge(host: &impl Host, request: &Request, run: Run) -> Result<Outcome> {
    let plan = Plan::new(request);
    let mut before = read(host, request, &plan, Counters::Left)?;
    let mut changes = missing(&plan, &before);
    if run == Run::Apply && !changes.is_empty() && before.values().any(|found| !found.is_empty()) {
        before = read(host, request, &plan, Counters::Taken)?;
        changes = missing(&plan, &before);
    }
    let foretold = before
        .iter()
        .map(|(family, found)| (*family, applied(&changes, *family, found)))
        .collect();
    let mut outcome = Outcome {
        variant: host.variant(),
        before,
        after: foretold,
        changes,
        warnings: warnings(host),
        failure: None,
    };
    if run == Run::Check || outcome.changes.is_empty() {
        return Ok(outcome);
    }
    if let Err(error) = carry_out(host, request, &plan, &outcome) {
        let undone = undo(host, request, &plan, &mut outcome);
        outcome.failure = Some(format!("{error:#}; {undone}"));
    }
    Ok(outcome)
}

fn warnings(host: &impl Host) -> Vec<String> {
    let other = match host.variant() {
        Variant::Nft => Variant::Legacy,
        Variant::Legacy => Variant::Nft,
    };
    let mixed = host.other_variant_in_use().then(|| {
        format!("there are rules of iptables-{} too; both variants act on every packet, one after the other", other.as_str())
    });
    mixed.into_iter().collect()
}

/// The changes that the plan still calls for.
fn missing(plan: &Plan, found: &State) -> Vec<Change> {
    let in_family = |(family, found): (&Family, &Ruleset)| diff::to_plan(plan, *family, found);
    found.iter().flat_map(in_family).collect()
}

/// Counters are read only before something is changed that has some: the usual
/// run finds nothing to do.
#[derive(Clone, Copy, PartialEq)]
enum Counters {
    Left,
    Taken,
}

/// Every family that is planned for, and every other that the host has
/// programs for, since something may be left there from before.
fn read(host: &impl Host, request: &Request, plan: &Plan, counters: Counters) -> Result<State> {
    let look = Look {
        name: &request.name,
        scope: match request.wanted {
            Wanted::Absent => Scope::All,
            Wanted::Present(_) => Scope::Nat,
        },
        counters: counters == Counters::Taken,
    };
    let families = Family::BOTH
        .into_iter()
        .filter(|family| plan.uses(*family) || host.supports(*family));
    thread::scope(|threads| {
        let readers: Vec<_> = families
            .map(|family| (family, threads.spawn(move || host.read(family, look))))
            .collect();
        let finished = readers.into_iter().map(|(family, reader)| {
            let read = reader
                .join()
                .unwrap_or_else(|_| Err(anyhow::anyhow!("reading the host panicked")));
            Ok((family, read?))
        });
        finished.collect()
    })
}

/// Writes, reads again, and compares: what is found decides.
fn carry_out(host: &impl Host, request: &Request, plan: &Plan, outcome: &Outcome) -> Result<()> {
    write(host, &outcome.changes)?;
    let missing = missing(plan, &read(host, request, plan, Counters::Left)?);
    match missing.is_empty() {
        true => Ok(()),
        false => anyhow::bail!(
            "the rules were written, but reading them again shows something else: {} would still be needed",
            listed(&missing)
        ),
    }
}

/// One transaction for each family that has changes.
fn write(host: &impl Host, changes: &[Change]) -> Result<()> {
    for family in Family::BOTH {
        if let Some(transaction) = restore::transaction(changes, family) {
            host.restore(family, &transaction)?;
        }
    }
    Ok(())
}

/// Puts back what was there. Returns the state of the host as a clause, and
/// corrects the outcome to it.
fn undo(host: &impl Host, request: &Request, plan: &Plan, outcome: &mut Outcome) -> String {
    let towards_before = |found: &State| -> Vec<Change> {
        let changes = |(family, earlier): (&Family, &Ruleset)| {
            let nothing = Ruleset::default();
            diff::to_earlier(earlier, *family, found.get(family).unwrap_or(&nothing))
        };
        outcome.before.iter().flat_map(changes).collect()
    };
    let attempt = || -> Result<Vec<Change>> {
        let found = read(host, request, plan, Counters::Left)?;
        write(host, &towards_before(&found))?;
        Ok(towards_before(&read(host, request, plan, Counters::Left)?))
    };
    match attempt() {
        Ok(left) if left.is_empty() => {
            outcome.changes.clear();
            outcome.after = outcome.before.clone();
            "the host is as before".to_owned()
        }
        Ok(left) => format!("undoing it left this to be done: {}", listed(&left)),
        Err(error) => match read(host, request, plan, Counters::Left) {
            Ok(found) => format!(
                "undoing it failed too ({error:#}), which leaves this to be done: {}",
                listed(&towards_before(&found))
            ),
            Err(again) => format!(
                "undoing it failed too ({error:#}), and what is left cannot be read ({again:#})"
            ),
        },
    }
}

/// Changes in a few words each.
fn listed(changes: &[Change]) -> String {
    const MOST: usize = 10;
    let worded = |change: &Change| {
        let place = format!(
            "{} {} {} {}",
            change.family.as_str(),
            change.table.as_str(),
            change.action.kind().as_str(),
            change.chain
        );
        match change.action.rule() {
            Some(rule) => format!("{place} `{}`", rule.shown()),
            None => place,
        }
    };
    let mut words: Vec<String> = changes.iter().take(MOST).map(worded).collect();
    if changes.len() > MOST {
        words.push(format!("and {} more", changes.len() - MOST));
    }
    words.join(", ")
}
