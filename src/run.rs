//! One invocation on this host, from request to report.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::converge::outcome::{Outcome, RunMode, Steps};
use crate::converge::prefetch::{PendingPrefetch, Prefetch, Proof};
use crate::converge::{Hooks, converge};
use crate::effects::draining::{Draining, Remaining};
use crate::health;
use crate::host::{Dumps, Host, Lock, Names, Scope, System, lookup};
use crate::netfilter::{Table, Variant};
use crate::plan::Plan;
use crate::report::{Prewriter, Report};
use crate::request::{BadRequest, DesiredState, Request, UncheckedRequest};
use crate::situation::{Outdated, Situation};
use crate::state::{Checked, State, WordedRequest};

/// A request, and the form of the answer.
#[derive(Clone, Debug)]
pub struct Invocation {
    /// The request.
    pub request: UncheckedRequest,
    /// Apply, or predict.
    pub mode: RunMode,
    /// Report the state before and after.
    pub diff: bool,
}

/// Runs an invocation: [`on_this_host`], or a stand-in in a test.
pub type Run<'a> = &'a dyn Fn(&Invocation) -> Report;

/// The things that outlive one run, where there are any.
#[derive(Clone, Default)]
pub struct Surroundings {
    /// The lock, where the caller holds it.
    pub lock: Option<Rc<Lock>>,
    /// The verdicts of a watcher, where the caller is one.
    pub verdicts: Option<Rc<Vec<Checked>>>,
    /// The addresses of names, where the caller keeps them.
    pub names: Option<Rc<Names>>,
    /// The dumps of earlier runs.
    pub dumps: Option<Rc<Dumps>>,
}

/// Runs an invocation on this host.
#[must_use]
pub fn on_this_host(invocation: &Invocation) -> Report {
    run_within(invocation, &Surroundings::default())
}

/// Several invocations on this host, one after the other. A dump serves all of
/// them for as long as it is certain that it is true.
#[derive(Default)]
pub struct Session(Rc<Dumps>);

impl Session {
    /// Runs an invocation on this host.
    #[must_use]
    pub fn run(&self, invocation: &Invocation) -> Report {
        let surroundings = Surroundings {
            dumps: Some(Rc::clone(&self.0)),
            ..Surroundings::default()
        };
        run_within(invocation, &surroundings)
    }
}

/// Runs an invocation on this host, within what its caller has already.
#[must_use]
pub fn run_within(invocation: &Invocation, surroundings: &Surroundings) -> Report {
    let UncheckedRequest { name, state, .. } = &invocation.request;
    match try_run(invocation, surroundings) {
        Ok(report) if invocation.diff => report.with_diff(),
        Ok(report) => report,
        Err(error) if error.is::<BadRequest>() => Report::unread(name, *state, error.to_string()),
        Err(error) => Report::unread(name, *state, format!("{error:#}; nothing was changed")),
    }
}

/// The host prints its rules while the request is checked. An error in the
/// request is reported before an error of the host.
fn try_run(invocation: &Invocation, surroundings: &Surroundings) -> Result<Report> {
    let unchecked = &invocation.request;
    let host = open(unchecked, surroundings);
    let state = State::of(&unchecked.name);
    let to_keep = match (&state, invocation.mode, unchecked.state) {
        (Ok(state), RunMode::Apply, DesiredState::Present) => Some(state.compare(unchecked)),
        _ => None,
    };
    let pending = match &host {
        Ok(host) if unchecked.state == DesiredState::Present => {
            let is_change_expected = to_keep.as_ref().is_some_and(|request| !request.is_kept());
            let proof = proof(host, unchecked, surroundings, is_change_expected);
            Some(prefetch(host, unchecked, proof))
        }
        _ => None,
    };
    let pending = RefCell::new(pending);
    let request = match &surroundings.names {
        Some(names) => unchecked.resolve(&|name| names.lookup(name))?,
        None => unchecked.resolve(&|name| {
            give_up_proof(&mut pending.borrow_mut());
            lookup(name)
        })?,
    };
    let host = host.as_ref().map_err(|error| anyhow!("{error:#}"))?;
    let run = Running {
        host,
        invocation,
        surroundings,
        state: state?,
        to_keep,
    };
    run.finish(request, pending.into_inner())
}

/// The proof that saves a run its second dump, where there is one. Counters make a dump
/// larger, and the lock keeps others waiting, so it is taken where a change is expected.
fn proof(
    host: &System,
    unchecked: &UncheckedRequest,
    surroundings: &Surroundings,
    is_change_expected: bool,
) -> Option<Proof> {
    let has_lock = surroundings.lock.is_some();
    let is_worth_it = match host.variant() {
        // With a set the counters cost next to nothing beside the number of rules.
        Variant::Nft => unchecked.is_set() && surroundings.dumps.is_none(),
        Variant::Legacy => false,
    };
    if !is_worth_it && !is_change_expected && !has_lock {
        return None;
    }
    match host.variant() {
        Variant::Nft => host.generation().map(Proof::Generation),
        Variant::Legacy => host.try_lock().ok().flatten().map(Proof::Lock),
    }
}

fn give_up_proof(pending: &mut Option<PendingPrefetch>) {
    if let Some(pending) = pending {
        pending.give_up_proof();
    }
}

fn open(unchecked: &UncheckedRequest, surroundings: &Surroundings) -> Result<System> {
    let mut host = System::open(unchecked.variant.required(), unchecked.wait)?;
    if let Some(dumps) = &surroundings.dumps {
        host = host.in_session(dumps);
    }
    if let Some(lock) = &surroundings.lock {
        host = host.under(Rc::clone(lock));
    }
    Ok(host)
}

fn prefetch<'a>(
    host: &'a System,
    unchecked: &'a UncheckedRequest,
    proof: Option<Proof>,
) -> PendingPrefetch<'a> {
    let scope = match unchecked.mentions_filter() {
        true => Scope::All,
        false => Scope::Only(Table::Nat),
    };
    Prefetch::begin(host, &unchecked.name, scope, proof)
}

/// A run whose request is valid.
struct Running<'a> {
    host: &'a System,
    invocation: &'a Invocation,
    surroundings: &'a Surroundings,
    state: State,
    /// The text to keep after a success; `None` where the balancer is removed.
    to_keep: Option<WordedRequest>,
}

impl Running<'_> {
    /// Converges, keeps the request, and waits for connections to end. When a hold or
    /// a verdict has changed meanwhile, the run begins anew with that.
    fn finish(&self, mut request: Request, mut pending: Option<PendingPrefetch>) -> Result<Report> {
        const ATTEMPTS: u32 = 5;
        let verdicts = self.surroundings.verdicts.as_ref();
        if verdicts.is_none() && health::targets(&request).next().is_some() {
            give_up_proof(&mut pending);
        }
        let mut situation = Situation::find(&self.state, &request, verdicts.map(|one| &**one));
        let mut attempts = 0;
        let (mut outcome, prewriter) = loop {
            attempts += 1;
            match self.attempt(&mut request, &situation, pending.take()) {
                Err(error) if error.is::<Outdated>() && attempts < ATTEMPTS => {
                    situation.update();
                }
                result => break result?,
            }
        };
        outcome.warnings.extend(situation.warnings(&request));
        outcome.warnings.extend(self.keep(&outcome));
        drop(outcome.lock.take());
        let draining = self.drain(&request, &mut outcome);
        let report = Report::new(request, outcome, prewriter, self.invocation.mode);
        Ok(report.with_draining(draining))
    }

    fn attempt(
        &self,
        request: &mut Request,
        situation: &Situation,
        pending: Option<PendingPrefetch>,
    ) -> Result<(Outcome, Prewriter)> {
        let nearly = request.decide(&situation.circumstances());
        let prewriter = Prewriter::default();
        let mut progress = Progress {
            request,
            prewriter: &prewriter,
            situation,
            pending,
        };
        let mut outcome = converge(self.host, request, self.invocation.mode, &mut progress)?;
        drop(progress);
        outcome.warnings.extend(nearly);
        Ok((outcome, prewriter))
    }

    /// Waits after a change until backends that are out of service have no connections,
    /// no longer than `drain_timeout`. Returns those that are left.
    fn drain(&self, request: &Request, outcome: &mut Outcome) -> Option<Vec<Remaining>> {
        // Whoever holds the lock must not keep others waiting: `watch`, `hold`, `release`.
        let may_wait = self.surroundings.lock.is_none();
        if request.drain_timeout.is_zero() || outcome.failure.is_some() || !may_wait {
            return None;
        }
        let has_changed = !outcome.steps.is_empty() && self.invocation.mode == RunMode::Apply;
        let longest = match has_changed {
            true => request.drain_timeout,
            false => Duration::ZERO,
        };
        let before = outcome.before.rules.iter();
        let before = before.map(|(family, ruleset)| (*family, &**ruleset));
        let draining = Draining::new(request, &Plan::new(request), before);
        match draining.wait(self.host, longest) {
            Ok(remaining) => Some(remaining),
            Err(error) => {
                let warning = format!("drain_timeout: cannot wait for connections: {error:#}");
                outcome.warnings.push(warning);
                None
            }
        }
    }

    /// Keeps the request for `hold`, `release` and `watch`; returns a warning where
    /// that is not possible.
    fn keep(&self, outcome: &Outcome) -> Option<String> {
        if self.invocation.mode == RunMode::Check || outcome.failure.is_some() {
            return None;
        }
        let kept = match &self.to_keep {
            Some(request) => self.state.keep_request(request),
            None => self.state.forget(),
        };
        let error = kept.err()?;
        Some(format!(
            "the request could not be kept for `hold`, `release` and `watch`: {error:#}"
        ))
    }
}

/// The parts of a run that are done while iptables works.
struct Progress<'a> {
    request: &'a Request,
    prewriter: &'a Prewriter,
    situation: &'a Situation,
    pending: Option<PendingPrefetch<'a>>,
}

impl Hooks for Progress<'_> {
    fn prefetch(&mut self) -> Prefetch {
        let Some(pending) = self.pending.take() else {
            return Prefetch::default();
        };
        if !pending.is_ready() {
            self.prewriter.write_shares(self.request);
        }
        pending.finish()
    }

    fn locked(&mut self) -> Result<()> {
        self.situation.check()
    }

    fn meanwhile(&mut self, steps: &Steps) {
        self.prewriter.write_shares(self.request);
        self.prewriter.write_steps(steps);
    }
}
