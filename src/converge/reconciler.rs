//! One request on one host: observe, diff, write, verify.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::Hooks;
use super::outcome::{HostState, Outcome, Steps};
use super::prefetch::{Prefetch, Proof};
use super::retry::{Applied, Attempt, RetryLog, reads_like, somebody_else_wrote};
use super::rollback::summary;
use crate::diff;
use crate::diff::change;
use crate::effects::conntrack::Disconnects;
use crate::effects::{self, Effect, HostSettings, SavedFile, rules_file, sysctl};
use crate::host::{Host, Query, Scope, forwarding_sysctl};
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Family, Table};
use crate::panic::catch_panic;
use crate::plan::{self, Plan};
use crate::request::{Persist, Request};
use crate::restore::{self, Step};

/// Read counters, or save iptables the time. They are needed only before a
/// change: a usual run finds nothing to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Counters {
    Skip,
    Read,
}

/// A request on its way to a host.
pub(super) struct Reconciler<'a, H> {
    pub host: &'a H,
    request: &'a Request,
    plan: Plan,
    /// The files that the request is about, with the family of their rules.
    files: BTreeMap<PathBuf, Option<Family>>,
}

impl<'a, H: Host> Reconciler<'a, H> {
    /// # Errors
    /// When `persist` finds no file.
    pub fn new(host: &'a H, request: &'a Request) -> Result<Self> {
        let plan = supported_plan(host, request);
        Ok(Self {
            host,
            request,
            files: files(host, request, &plan)?,
            plan,
        })
    }

    /// Reads the host, except for what was prefetched.
    ///
    /// # Errors
    /// When something cannot be read, or is hidden from iptables.
    pub fn observe(&self, prefetch: Prefetch, counters: Counters) -> Result<HostState> {
        Ok(HostState {
            rules: self.rules(prefetch, counters)?,
            settings: self.settings()?,
        })
    }

    fn settings(&self) -> Result<HostSettings> {
        let files = self.files.iter();
        let files = files.map(|(path, family)| Ok((path.clone(), self.file(path, *family)?)));
        Ok(HostSettings {
            forwarding: sysctl::observe(self.host),
            files: files.collect::<Result<_>>()?,
        })
    }

    /// The steps from the observed state to the desired one.
    pub fn drift(&self, state: &HostState) -> Steps {
        let in_family =
            |(family, found): (&Family, &Arc<Ruleset>)| diff::to_plan(&self.plan, *family, found);
        Steps {
            changes: diff::joined(state.rules.iter().map(in_family)),
            effects: effects::drift(self.request, &self.plan, &state.settings),
        }
    }

    /// # Errors
    /// When forwarding is requested, and cannot be read.
    pub fn check_forwarding(&self, state: &HostState) -> Result<()> {
        let unknown = effects::unknown_forwarding(self.request, &self.plan, &state.settings);
        match unknown {
            None => Ok(()),
            Some(family) => bail!(
                "ip_forward: cannot tell whether this host forwards {}, since {} cannot be read",
                family.title(),
                forwarding_sysctl(family)
            ),
        }
    }

    /// The attempt that starts from the state right before a change, with its
    /// counters. A state that is proved to be the present one has them, and its rules
    /// are not read again; the steps from an empty host are not computed again.
    ///
    /// # Errors
    /// As [`Self::observe`].
    pub fn attempt(
        &self,
        state: HostState,
        steps: Steps,
        proof: Option<&Proof>,
    ) -> Result<Attempt> {
        if steps.is_empty() {
            return Ok(Attempt {
                steps,
                before: state,
            });
        }
        let is_present = match proof {
            Some(Proof::Generation(then)) => self.host.generation() == Some(*then),
            Some(Proof::Lock(_)) => true,
            None => false,
        };
        let before = match is_present {
            true => HostState {
                rules: state.rules.clone(),
                settings: self.settings()?,
            },
            false => self.observe(Prefetch::default(), Counters::Read)?,
        };
        if is_present && before.settings == state.settings {
            return Ok(Attempt { steps, before });
        }
        let is_bare = before.rules.values().all(|ruleset| ruleset.is_empty());
        let steps = match is_bare && before == state {
            true => steps,
            false => self.drift(&before),
        };
        Ok(Attempt { steps, before })
    }

    /// The connections that are to be ended after an attempt.
    pub fn disconnects(&self, attempt: &Attempt) -> Disconnects {
        let Attempt { steps, before } = attempt;
        Disconnects::plan(self.request, &self.plan, &before.rules, &steps.changes)
    }

    /// The outcome of an attempt that is not made.
    pub fn predict(&self, attempt: Attempt, mut disconnects: Disconnects) -> Outcome {
        let Attempt { mut steps, before } = attempt;
        steps.effects.extend(disconnects.predict(self.host));
        Outcome {
            after: self.state_after(&before, &steps),
            warnings: disconnects.warning.into_iter().collect(),
            ..self.outcome(before, steps)
        }
    }

    /// Makes an attempt, and others if it needs them. What fails is rolled back,
    /// also after a panic.
    pub fn apply(
        &self,
        first: Attempt,
        mut disconnects: Disconnects,
        hooks: &mut impl Hooks,
    ) -> Outcome {
        let mut log = RetryLog::default();
        let applied = without_panic(|| self.write_with_retries(&first, &mut log, hooks));
        let attempts = 1 + log.further.len();
        let (Attempt { steps, before }, last) = log.merge(first);
        let mut outcome = self.outcome(before, steps);
        outcome.attempts = attempts;
        match applied {
            Ok(after) => outcome.after = after,
            Err(error) => {
                let state = self.roll_back(&mut outcome, last.as_ref());
                outcome.failure = Some(format!("{error:#}; {state}"));
                return outcome;
            }
        }
        match without_panic(|| disconnects.apply(self.host)) {
            Ok(effects) => outcome.steps.effects.extend(effects),
            Err(error) => {
                let state = self.roll_back(&mut outcome, last.as_ref());
                outcome.failure = Some(format!(
                    "{error:#}; but for connections that have ended already, {state}"
                ));
            }
        }
        outcome.warnings.extend(disconnects.warning);
        outcome
    }

    fn outcome(&self, before: HostState, steps: Steps) -> Outcome {
        Outcome {
            variant: self.host.variant(),
            after: before.clone(),
            before,
            steps,
            warnings: Vec::new(),
            failure: None,
            attempts: 0,
            lock: None,
        }
    }

    /// Computes the state after the steps.
    pub fn state_after(&self, before: &HostState, steps: &Steps) -> HostState {
        let rules = |(family, found): (&Family, &Arc<Ruleset>)| {
            let is_changed = steps.changes.iter().any(|change| change.family == *family);
            let after = match is_changed {
                true => change::applied(&steps.changes, *family, found).into(),
                false => found.clone(),
            };
            (*family, after)
        };
        HostState {
            rules: before.rules.iter().map(rules).collect(),
            settings: effects::predict(&steps.effects, &before.settings, self.request),
        }
    }

    /// Others may write at the same time, and make a write fail or undo it. Then
    /// the diff is computed again from the present state, a few times.
    fn write_with_retries(
        &self,
        first: &Attempt,
        log: &mut RetryLog,
        hooks: &mut impl Hooks,
    ) -> Result<HostState> {
        const ATTEMPTS: usize = 3;
        loop {
            let attempt = log.further.last().unwrap_or(first);
            let mut applied = Applied::default();
            let error = match self.write_and_verify(attempt, &mut applied, hooks) {
                Ok(after) => return Ok(after),
                Err(error) => error,
            };
            let now = self.observe(Prefetch::default(), Counters::Read)?;
            let predicted = self.state_after(&attempt.before, &attempt.steps);
            let is_last = log.further.len() + 1 == ATTEMPTS;
            if is_last || !somebody_else_wrote(&attempt.before, &predicted, &now) {
                return Err(error);
            }
            // A write may have succeeded although it reported a failure.
            let is_written = |family: &Family| {
                reads_like(&predicted, &now, *family) && !reads_like(&attempt.before, &now, *family)
            };
            let written = Family::BOTH.into_iter().filter(is_written);
            applied.families.extend(written);
            log.applied.push(applied);
            log.further.push(Attempt {
                steps: self.drift(&now),
                before: now,
            });
        }
    }

    /// Writes, and reads again: the observed state decides.
    fn write_and_verify(
        &self,
        attempt: &Attempt,
        applied: &mut Applied,
        hooks: &mut impl Hooks,
    ) -> Result<HostState> {
        let Attempt { steps, before } = attempt;
        self.write(steps, before, applied, &mut || hooks.meanwhile(steps))?;
        let after = self.observe(Prefetch::default(), Counters::Skip)?;
        let drift = self.drift(&after);
        if !drift.is_empty() {
            bail!(
                "the rules were written, but reading them again shows something else: {} would still be needed",
                summary(&drift)
            );
        }
        Ok(after)
    }

    /// Runs the transactions of each family that has changes, then the side
    /// effects except for the end of connections.
    ///
    /// # Errors
    /// The first step that fails; `applied` has what was done before it.
    pub fn write(
        &self,
        steps: &Steps,
        found: &HostState,
        applied: &mut Applied,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<()> {
        let nothing = Ruleset::default();
        for family in Family::BOTH {
            let found = found.rules.get(&family).map_or(&nothing, AsRef::as_ref);
            for step in restore::steps(&steps.changes, family, found) {
                match step {
                    Step::Transaction(text) => self.host.restore(family, &text, meanwhile)?,
                    Step::DeleteJumps(table) => {
                        self.host.delete_jumps(family, table, &self.request.name)?;
                    }
                }
            }
            applied.families.insert(family);
        }
        for effect in &steps.effects {
            match effect {
                Effect::Forwarding { family, on } => self.host.set_forwarding(*family, *on)?,
                Effect::Write { path, text, .. } => {
                    let mode = match sysctl::is_file(path) {
                        true => sysctl::MODE,
                        false => rules_file::MODE,
                    };
                    self.host.store(path, text.as_deref(), mode)?;
                }
                Effect::Disconnect(_) => continue,
            }
            applied.effects += 1;
        }
        Ok(())
    }

    fn file(&self, path: &Path, family: Option<Family>) -> Result<SavedFile> {
        let text = self.host.load(path)?;
        let ruleset = match sysctl::is_file(path) {
            true => None,
            false => Some(self.rules_in_file(path, text.as_deref().unwrap_or_default())?),
        };
        Ok(SavedFile {
            family,
            text,
            ruleset,
        })
    }

    fn rules_in_file(&self, path: &Path, text: &[u8]) -> Result<Ruleset> {
        let shown = path.display();
        if let Some(table) = rules_file::table_twice(text) {
            bail!(
                "persist: `{shown}` has the table `{table}` twice, of which only the last is loaded; make it one"
            );
        }
        let read = Ruleset::read(text, &self.request.name);
        read.with_context(|| format!("persist: cannot read the rules in `{shown}`"))
    }

    /// The owned rules of every family that is planned, and of every other one
    /// that the host supports: an earlier request may have left rules there.
    fn rules(
        &self,
        prefetch: Prefetch,
        counters: Counters,
    ) -> Result<BTreeMap<Family, Arc<Ruleset>>> {
        let families = Family::BOTH
            .into_iter()
            .filter(|family| self.plan.uses(*family) || self.host.supports(*family));
        let query = |(family, scope)| Query {
            family,
            scope,
            counters: counters == Counters::Read,
        };
        let scopes = families.flat_map(|family| self.scopes(family, prefetch.scope(family)));
        let scopes: Vec<(Family, Scope)> = scopes.collect();
        let mut found = self.read(scopes.iter().copied().map(query).collect(), prefetch)?;
        let is_whole = |family: Family| scopes.contains(&(family, Scope::All));
        let mut left_in_filter = self.families_left_in_filter(&found);
        if !self.request.is_absent() {
            for (family, ruleset) in found.iter_mut().filter(|(family, _)| is_whole(**family)) {
                let is_planned = self.plan.tables.contains_key(&(*family, Table::Filter));
                let is_left = left_in_filter.iter().any(|(left, _)| left == family);
                ruleset.tables.retain(|table, _| match table {
                    Table::Nat => true,
                    Table::Filter => is_planned || is_left,
                    _ => false,
                });
            }
        }
        left_in_filter.retain(|(family, _)| !is_whole(*family));
        let queries = left_in_filter.into_iter().map(query).collect();
        for (family, filter) in self.read(queries, Prefetch::default())? {
            let nat = found.remove(&family).unwrap_or_default();
            found.insert(family, nat.and(filter));
        }
        let shared = |(family, ruleset): (Family, Ruleset)| (family, ruleset.into());
        Ok(found.into_iter().map(shared).collect())
    }

    /// The families whose nat table tells that the balancer has rules in filter,
    /// where none is planned.
    fn families_left_in_filter(&self, found: &BTreeMap<Family, Ruleset>) -> Vec<(Family, Scope)> {
        let is_left = |(family, ruleset): &(&Family, &Ruleset)| {
            let is_planned = self.plan.tables.contains_key(&(**family, Table::Filter));
            let is_marked = plan::is_marked(&self.request.name, ruleset.owned(Table::Nat));
            is_marked && !is_planned && !self.request.is_absent()
        };
        let left = found.iter().filter(is_left);
        left.map(|(family, _)| (*family, Scope::Only(Table::Filter)))
            .collect()
    }

    /// The tables of a family that are read in any case. A set takes one dump, also
    /// where it has rules in filter.
    fn scopes(&self, family: Family, prefetched: Option<Scope>) -> Vec<(Family, Scope)> {
        let uses_filter = self.plan.tables.contains_key(&(family, Table::Filter));
        let is_whole = match prefetched {
            Some(scope) => scope == Scope::All,
            None => uses_filter && self.request.is_set(),
        };
        if is_whole || self.request.is_absent() {
            return vec![(family, Scope::All)];
        }
        let mut scopes = vec![(family, Scope::Only(Table::Nat))];
        if uses_filter {
            scopes.push((family, Scope::Only(Table::Filter)));
        }
        scopes
    }

    /// Reads all queries at the same time, and merges them by family.
    fn read(
        &self,
        queries: Vec<Query>,
        mut prefetch: Prefetch,
    ) -> Result<BTreeMap<Family, Ruleset>> {
        let mut answers = Vec::new();
        let mut open = Vec::new();
        for query in queries {
            match prefetch.take(query) {
                Some(ruleset) => answers.push((query, ruleset)),
                None => open.push(query),
            }
        }
        if !open.is_empty() {
            let rulesets = self
                .host
                .begin_read(&self.request.name, open.clone())
                .finish();
            answers.extend(open.into_iter().zip(rulesets));
        }
        let mut found = BTreeMap::<Family, Ruleset>::new();
        for (query, ruleset) in answers {
            let ruleset = ruleset?;
            self.check_readable(&ruleset, query)?;
            let others = found.remove(&query.family).unwrap_or_default();
            found.insert(query.family, others.and(ruleset));
        }
        Ok(found)
    }

    /// A hidden table is not an empty one, where it matters.
    fn check_readable(&self, found: &Ruleset, query: Query) -> Result<()> {
        let matters = |table: &Table| {
            let is_planned = self.plan.tables.contains_key(&(query.family, *table));
            is_planned || (query.scope == Scope::All && *table == Table::Nat)
        };
        let mut hidden = [Table::Nat, Table::Filter]
            .into_iter()
            .filter(|table| found.hides(*table));
        match hidden.find(matters) {
            None => Ok(()),
            Some(table) => bail!(
                "the {} table `{}` has rules that `nft` made and iptables cannot show; \
                 remove them with `nft`, or give them a table of their own",
                query.family.title(),
                table.as_str()
            ),
        }
    }
}

/// Turns a panic into an error, so that what has begun is rolled back.
pub(super) fn without_panic<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_panic(act).map_err(anyhow::Error::msg)?
}

/// The plan without the empty pools of families that the host does not support:
/// an empty list of backends is of no family in particular.
fn supported_plan(host: &impl Host, request: &Request) -> Plan {
    let mut plan = Plan::new(request);
    for family in Family::BOTH {
        let mut pools = request.pools().filter(|(_, pool)| pool.family == family);
        if !host.supports(family) && pools.all(|(_, pool)| pool.backends.is_empty()) {
            plan.tables.retain(|(used, _), _| *used != family);
        }
    }
    plan
}

/// The files that the request is about, with the family of their rules.
fn files(
    host: &impl Host,
    request: &Request,
    plan: &Plan,
) -> Result<BTreeMap<PathBuf, Option<Family>>> {
    let of_family = |(family, path): (Family, PathBuf)| (path, Some(family));
    let mut used = Family::BOTH.into_iter().filter(|family| plan.uses(*family));
    let mut files: BTreeMap<PathBuf, Option<Family>> = match &request.persist {
        Persist::No => BTreeMap::new(),
        Persist::Path(path) => BTreeMap::from([(path.clone(), used.next())]),
        Persist::Paths(paths) => paths.clone().into_iter().map(of_family).collect(),
        Persist::Found => {
            let found = host.boot_files()?;
            if let Some(family) = used.find(|family| !found.contains_key(family)) {
                bail!(
                    "persist: nothing on this host would load {} rules at boot; name the file that is loaded",
                    family.title()
                );
            }
            found.into_iter().map(of_family).collect()
        }
    };
    if sysctl::is_persistent(request) {
        files.insert(sysctl::FILE.into(), None);
    }
    Ok(files)
}
