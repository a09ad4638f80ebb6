//! Brings the host to what is planned: read, compare, stop or write, read
//! again, and undo when that does not show what was planned.

pub mod outcome;
pub mod prefetch;
pub mod retry;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::diff;
use crate::diff::change::{Change, applied};
use crate::effects::conntrack;
use crate::effects::rules_file;
use crate::effects::{self, Effect, File, HostSettings};
use crate::host::{Host, Scope};
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Family, Table};
use crate::panic::catch_panic;
use crate::plan::{self, Plan};
use crate::preflight::warnings;
use crate::preflight::{self, Facts, Questions};
use crate::request::{Persist, Request};
use crate::restore;
use outcome::{HostState, Outcome, RunMode, Steps};
use prefetch::{Counters, Prefetch, Read};
use retry::{Attempt, Done, RetryLog, somebody_else_wrote};

/// Does what the request asks for. What was read of the host before, if there
/// is such, need not be read again to see that there is nothing to do. While
/// the steps are carried out `meanwhile` is done too, if it can be.
///
/// # Errors
/// When the host cannot be read, or the request would do harm there. Nothing
/// has been changed then; what fails later is in the [`Outcome`].
pub fn converge(
    host: &impl Host,
    request: &Request,
    run: RunMode,
    glance: impl FnOnce() -> Option<Prefetch>,
    meanwhile: impl FnOnce(&Steps) + Send,
) -> Result<Outcome> {
    let plan = plan_for(host, request);
    let facts = match request.balancer() {
        Some(balancer) => host.facts(&preflight::questions(balancer, &forwarding(host))),
        None => Facts::default(),
    };
    let mut told = match request.balancer() {
        Some(balancer) => preflight::check(balancer, &facts).map_err(anyhow::Error::msg)?,
        None => Vec::new(),
    };
    let errand = Reconciler {
        host,
        request,
        files: files(host, request, &plan)?,
        plan,
    };
    let mut before = errand.look_on(glance().unwrap_or_default(), Counters::Left)?;
    if let Some(family) = effects::unknown_forwarding(request, &errand.plan, &before.settings) {
        bail!(
            "ip_forward: cannot tell whether this host forwards {}, since {} cannot be read",
            family.title(),
            effects::setting(family)
        );
    }
    let mut steps = errand.missing(&before);
    let _lock = match run {
        RunMode::Apply if !steps.is_empty() => Some(host.lock()?),
        RunMode::Apply | RunMode::Check => None,
    };
    if !steps.is_empty() {
        let now = errand.look(Counters::Taken)?;
        let is_bare = now.rules.values().all(|ruleset| ruleset.is_empty());
        if !is_bare || now != before {
            steps = errand.missing(&now);
        }
        before = now;
    }
    let ending = conntrack::foreseen(host, request, &errand.plan, &before.rules, &steps.changes);
    told.extend(warnings::all(host, request, &facts, &before, &steps, run));
    told.extend(ending.warning.clone());
    told.extend(still_at_boot(host, request));
    steps.effects.extend(ending.effects());
    let outcome = |before: HostState, steps, after| Outcome {
        variant: host.variant(),
        before,
        after,
        steps,
        warnings: told,
        failure: None,
        attempts: 0,
    };
    if run == RunMode::Check || steps.is_empty() {
        let after = foretold(request, &before, &steps);
        return Ok(outcome(before, steps, after));
    }
    let first = Attempt { steps, before };
    let mut course = RetryLog::default();
    let carried_out = thread::scope(|scope| {
        let beside = thread::Builder::new().spawn_scoped(scope, || meanwhile(&first.steps));
        let carried_out = unpanicked(|| errand.carry_out(&first, &mut course));
        // It matters to nobody else whether that went well.
        beside.map(|beside| beside.join().ok()).ok();
        carried_out
    });
    let attempts = 1 + course.further.len();
    let (Attempt { steps, before }, last) = course.told(first);
    let mut outcome = outcome(before.clone(), steps, before);
    outcome.attempts = attempts;
    match carried_out {
        Ok(after) => {
            outcome.after = after;
            outcome.warnings.extend(now_known(host, request, &facts));
        }
        Err(error) => {
            let undone = errand.undo(&mut outcome, last.as_ref());
            outcome.failure = Some(format!("{error:#}; {undone}"));
            return Ok(outcome);
        }
    }
    match unpanicked(|| ending.carry_out(host)) {
        Ok(ended) => {
            let effects = &mut outcome.steps.effects;
            effects.retain(|effect| !matches!(effect, Effect::Disconnect(_)));
            effects.extend(ended);
        }
        Err(error) => {
            let undone = errand.undo(&mut outcome, last.as_ref());
            outcome.failure = Some(format!(
                "{error:#}; but for connections that have ended already, {undone}"
            ));
        }
    }
    Ok(outcome)
}

/// The first rule in the nat table can be what makes the kernel track connections.
fn now_known(host: &impl Host, request: &Request, facts: &Facts) -> Option<String> {
    let balancer = request.balancer().filter(|_| !facts.is_untracked)?;
    preflight::untracked(balancer, &host.facts(&Questions::of_tracking(balancer)))
}

/// What has begun is brought to an end or undone, even if there is a bug in it,
/// or not a thread to be had.
fn unpanicked<T>(act: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_panic(act).map_err(anyhow::Error::msg)?
}

/// Which families are forwarded, as far as that is known.
fn forwarding(host: &impl Host) -> BTreeMap<Family, bool> {
    let known = |family| Some((family, host.forwarding(family)?));
    Family::BOTH.into_iter().filter_map(known).collect()
}

/// A pool without any backend is of no family in particular, so it is left out
/// for one that the host has no programs for.
fn plan_for(host: &impl Host, request: &Request) -> Plan {
    let mut plan = Plan::new(request);
    let pools = request
        .balancer()
        .map_or(&[][..], |balancer| &balancer.pools);
    for pool in pools.iter().filter(|pool| pool.backends.is_empty()) {
        if !host.supports(pool.family) {
            plan.tables.retain(|(family, _), _| *family != pool.family);
        }
    }
    plan
}

/// The files that matter, with the family of their rules. The settings have
/// none.
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
    if effects::keeps_forwarding(request) {
        files.insert(effects::SETTINGS.into(), None);
    }
    Ok(files)
}

/// The files that are loaded at boot and have something of a balancer that is
/// not asked to be kept there.
fn still_at_boot(host: &impl Host, request: &Request) -> Vec<String> {
    if request.persist != Persist::No {
        return Vec::new();
    }
    let files = host.boot_files().unwrap_or_default();
    let has_some = |path: &&PathBuf| {
        let text = host.load(path).ok().flatten().unwrap_or_default();
        let read = Ruleset::read(text.as_slice(), &request.name);
        read.is_ok_and(|ruleset| !ruleset.is_empty())
    };
    let found = files.values().filter(has_some);
    found
        .map(|path| {
            format!(
                "`{}` has something of the balancer too, and is loaded at boot; `persist: true` looks after it",
                path.display()
            )
        })
        .collect()
}

/// What would be there after the steps.
fn foretold(request: &Request, before: &HostState, steps: &Steps) -> HostState {
    let rules = |(family, found): (&Family, &Arc<Ruleset>)| {
        let untouched = !steps.changes.iter().any(|change| change.family == *family);
        let after = match untouched {
            true => found.clone(),
            false => applied(&steps.changes, *family, found).into(),
        };
        (*family, after)
    };
    HostState {
        rules: before.rules.iter().map(rules).collect(),
        settings: effects::applied(&steps.effects, &before.settings, request),
    }
}

/// A request on its way to a host.
struct Reconciler<'a, H> {
    host: &'a H,
    request: &'a Request,
    plan: Plan,
    files: BTreeMap<PathBuf, Option<Family>>,
}

impl<H: Host> Reconciler<'_, H> {
    fn look(&self, counters: Counters) -> Result<HostState> {
        self.look_on(Prefetch::default(), counters)
    }

    /// Looks at what was not yet seen.
    fn look_on(&self, seen: Prefetch, counters: Counters) -> Result<HostState> {
        let files = self.files.iter();
        let files = files.map(|(path, family)| Ok((path.clone(), self.file(path, *family)?)));
        Ok(HostState {
            rules: self.rules(seen, counters)?,
            settings: HostSettings {
                forwarding: forwarding(self.host),
                files: files.collect::<Result<_>>()?,
            },
        })
    }

    fn file(&self, path: &Path, family: Option<Family>) -> Result<File> {
        let text = self.host.load(path)?;
        let has_rules = path != Path::new(effects::SETTINGS);
        let read = || {
            let text = text.as_deref().unwrap_or_default();
            if let Some(table) = rules_file::table_twice(text) {
                let shown = path.display();
                bail!(
                    "persist: `{shown}` has the table `{table}` twice, of which only the last is loaded; make it one"
                );
            }
            let read = Ruleset::read(text, &self.request.name);
            read.with_context(|| format!("persist: cannot read the rules in `{}`", path.display()))
        };
        Ok(File {
            family,
            ruleset: has_rules.then(read).transpose()?,
            text,
        })
    }

    /// Every family that is planned for, and every other that the host has
    /// programs for, since something may be left there from before.
    fn rules(&self, seen: Prefetch, counters: Counters) -> Result<BTreeMap<Family, Arc<Ruleset>>> {
        let families = Family::BOTH
            .into_iter()
            .filter(|family| self.plan.uses(*family) || self.host.supports(*family));
        let wanted = families.flat_map(|family| self.scopes(family)).collect();
        let mut found = self.read(wanted, seen, counters)?;
        let mark = plan::filter_mark(&self.request.name);
        let is_behind = |(family, ruleset): &(&Family, &Ruleset)| {
            let planned = self.plan.tables.contains_key(&(**family, Table::Filter));
            let marked = ruleset.owned(Table::Nat).chains.contains_key(&mark);
            marked && !planned && self.request.balancer().is_some()
        };
        let behind: Vec<_> = found
            .iter()
            .filter(is_behind)
            .map(|(family, _)| (*family, Scope::Only(Table::Filter)))
            .collect();
        for (family, ruleset) in self.read(behind, Prefetch::default(), counters)? {
            let nat = found.remove(&family).unwrap_or_default();
            found.insert(family, nat.and(ruleset));
        }
        let shared = |(family, ruleset): (Family, Ruleset)| (family, ruleset.into());
        Ok(found.into_iter().map(shared).collect())
    }

    /// What of a family is looked at in any case.
    fn scopes(&self, family: Family) -> Vec<(Family, Scope)> {
        if self.request.balancer().is_none() {
            return vec![(family, Scope::All)];
        }
        let filter = self.plan.tables.contains_key(&(family, Table::Filter));
        let tables = [Some(Table::Nat), filter.then_some(Table::Filter)];
        tables
            .into_iter()
            .flatten()
            .map(|table| (family, Scope::Only(table)))
            .collect()
    }

    fn read(
        &self,
        wanted: Vec<(Family, Scope)>,
        mut seen: Prefetch,
        counters: Counters,
    ) -> Result<BTreeMap<Family, Ruleset>> {
        let mut unseen = Vec::new();
        let mut all: Vec<Read> = Vec::new();
        for (family, scope) in wanted {
            match seen.take(family, scope) {
                Some(ruleset) => all.push((family, scope, ruleset)),
                None => unseen.push((family, scope)),
            }
        }
        let begun = prefetch::begin(self.host, &self.request.name, unseen, counters);
        all.extend(prefetch::finish(begun));
        let mut found = BTreeMap::<Family, Ruleset>::new();
        for (family, scope, read) in all {
            let read = read?;
            self.check_readable(&read, family, scope)?;
            let others = found.remove(&family).unwrap_or_default();
            found.insert(family, others.and(read));
        }
        Ok(found)
    }

    /// A table that cannot be shown is not an empty one, where it matters.
    fn check_readable(&self, found: &Ruleset, family: Family, scope: Scope) -> Result<()> {
        let matters = |table: &Table| {
            let planned = self.plan.tables.contains_key(&(family, *table));
            planned || (scope == Scope::All && *table == Table::Nat)
        };
        let mut hidden = [Table::Nat, Table::Filter]
            .into_iter()
            .filter(|table| found.hides(*table));
        if let Some(table) = hidden.find(matters) {
            bail!(
                "the {} table `{}` has rules that `nft` made and iptables cannot show; \
                 remove them with `nft`, or give them a table of their own",
                family.title(),
                table.as_str()
            );
        }
        Ok(())
    }

    /// The steps that the plan still calls for.
    fn missing(&self, found: &HostState) -> Steps {
        let in_family =
            |(family, found): (&Family, &Arc<Ruleset>)| diff::to_plan(&self.plan, *family, found);
        Steps {
            changes: diff::joined(found.rules.iter().map(in_family)),
            effects: effects::missing(self.request, &self.plan, &found.settings),
        }
    }

    /// Does what there is to do, but for connections: these are ended at the very
    /// last, since that cannot be undone. Returns what there is then.
    ///
    /// Others may write at the same time, and make a write fail or undo it. Then
    /// what there is by now is compared anew, a few times.
    fn carry_out(&self, first: &Attempt, course: &mut RetryLog) -> Result<HostState> {
        const ATTEMPTS: usize = 3;
        loop {
            let attempt = course.further.last().unwrap_or(first);
            let mut done = Done::default();
            let error = match self.write_and_look(attempt, &mut done) {
                Ok(after) => return Ok(after),
                Err(error) => error,
            };
            let now = self.look(Counters::Taken)?;
            let after = foretold(self.request, &attempt.before, &attempt.steps);
            let is_last = course.further.len() + 1 == ATTEMPTS;
            if is_last || !somebody_else_wrote(&attempt.before, &after, &now) {
                return Err(error);
            }
            // Also where it was done and said to be refused.
            let reads_like = |state: &HostState, family: &Family| {
                let rules = state.rules.get(family).zip(now.rules.get(family));
                rules.is_some_and(|(then, now)| then.reads_like(now))
            };
            let is_done = |family: &Family| {
                reads_like(&after, family) && !reads_like(&attempt.before, family)
            };
            done.families
                .extend(Family::BOTH.into_iter().filter(is_done));
            course.done.push(done);
            course.further.push(Attempt {
                steps: self.missing(&now),
                before: now,
            });
        }
    }

    /// Writes, reads again, and compares: what is found decides.
    fn write_and_look(&self, attempt: &Attempt, done: &mut Done) -> Result<HostState> {
        self.write(&attempt.steps, &attempt.before, done)?;
        let after = self.look(Counters::Left)?;
        let missing = self.missing(&after);
        if !missing.is_empty() {
            bail!(
                "the rules were written, but reading them again shows something else: {} would still be needed",
                listed(&missing)
            );
        }
        Ok(after)
    }

    /// One transaction for each family that has changes, and then the rest.
    fn write(&self, steps: &Steps, found: &HostState, done: &mut Done) -> Result<()> {
        let nothing = Ruleset::default();
        for family in Family::BOTH {
            let found = found.rules.get(&family).map_or(&nothing, AsRef::as_ref);
            for transaction in restore::transactions(&steps.changes, family, found) {
                self.host.restore(family, &transaction)?;
            }
            done.families.insert(family);
        }
        for effect in &steps.effects {
            match effect {
                Effect::Forwarding { family, on } => self.host.set_forwarding(*family, *on)?,
                Effect::Write { path, text, .. } => self.host.store(path, text.as_deref())?,
                Effect::Disconnect(_) => continue,
            }
            done.effects += 1;
        }
        Ok(())
    }

    /// Puts back what was there, after the outcome's steps or the last attempt.
    /// Returns the state of the host as a clause, and corrects the outcome to it.
    fn undo(&self, outcome: &mut Outcome, last: Option<&Attempt>) -> String {
        let attempt = || -> Result<()> {
            let (steps, before) = match last {
                Some(last) => (&last.steps, &last.before),
                None => (&outcome.steps, &outcome.before),
            };
            let foretold = foretold(self.request, before, steps);
            let found = with_origins(self.look(Counters::Taken)?, &foretold);
            let back = back(&outcome.before, &found);
            self.write(&back, &found, &mut Done::default())
        };
        let undone = unpanicked(attempt);
        let found = match unpanicked(|| self.look(Counters::Left)) {
            Ok(found) => found,
            Err(again) => {
                let why = undone.err().map(|error| format!(" failed too ({error:#})"));
                let why = why.unwrap_or_else(|| " was tried".to_owned());
                return format!("undoing it{why}, and what is left cannot be read ({again:#})");
            }
        };
        let left = back(&outcome.before, &found);
        if left.is_empty() {
            outcome.steps = Steps::default();
            outcome.after = outcome.before.clone();
            return "the host is as before".to_owned();
        }
        outcome.after = found;
        match undone {
            Ok(()) => format!("undoing it left this to be done: {}", listed(&left)),
            Err(error) => format!(
                "undoing it failed too ({error:#}), which leaves this to be done: {}",
                listed(&left)
            ),
        }
    }
}

/// The steps that lead back.
fn back(before: &HostState, found: &HostState) -> Steps {
    let nothing = Ruleset::default();
    let in_family = |(family, earlier): (&Family, &Arc<Ruleset>)| {
        let now = found.rules.get(family).map_or(&nothing, AsRef::as_ref);
        diff::to_earlier(earlier, *family, now)
    };
    Steps {
        changes: diff::joined(before.rules.iter().map(in_family)),
        effects: effects::back(&before.settings, &found.settings),
    }
}

/// Where a table is as it was to become, it is known which of its rules were
/// written just now: they are not the earlier ones, even if they read the same.
fn with_origins(found: HostState, foretold: &HostState) -> HostState {
    let mark = |(family, ruleset): (Family, Arc<Ruleset>)| {
        let mut ruleset = Arc::unwrap_or_clone(ruleset);
        for (table, owned) in &mut ruleset.tables {
            let foretold = foretold.rules.get(&family);
            let known = foretold.and_then(|foretold| foretold.tables.get(table));
            let Some(known) = known.filter(|known| known.chains == owned.chains) else {
                continue;
            };
            for (chain, known) in owned.chains.values_mut().zip(known.chains.values()) {
                for (rule, known) in chain.rules.iter_mut().zip(&known.rules) {
                    rule.fresh = known.fresh;
                }
            }
        }
        (family, ruleset.into())
    };
    HostState {
        rules: found.rules.into_iter().map(mark).collect(),
        settings: found.settings,
    }
}

/// Steps in a few words each.
fn listed(steps: &Steps) -> String {
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
    let all = steps.changes.len() + steps.effects.len();
    let changes = steps.changes.iter().map(worded);
    let effects = steps
        .effects
        .iter()
        .map(|effect| format!("{} `{}`", effect.kind().as_str(), effect.shown()));
    let mut words: Vec<String> = changes.chain(effects).take(MOST).collect();
    if all > MOST {
        words.push(format!("and {} more", all - MOST));
    }
    words.join(", ")
}
