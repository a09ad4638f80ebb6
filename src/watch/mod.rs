//! A service that applies a request, checks its backends for ever, and applies it
//! again when a verdict changes, when others change its rules, and when a hold ends.
//!
//! One thread, one loop: [`Watcher::step`] waits for the first thing that happens.
//! A watcher repeats the run of `apply`, with verdicts of its own. Nothing that a run
//! does is written a second time here, so both agree.

mod log;
mod targets;

use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::converge::outcome::RunMode;
use crate::health;
use crate::host::service::{Notifier, RuleEvents, Signal, Signals, Singleton};
use crate::host::{Host, Lock, Names, Prober, Query, Scope, SourceKey, Stamp, System};
use crate::host::{seconds_since_1970, since_boot};
use crate::netfilter::{Family, Table};
use crate::report::Report;
use crate::request::{DesiredState, Name, UncheckedRequest};
use crate::run::{Invocation, Surroundings, run_within};
use crate::state::{Checked, State, Verdicts};
use log::Log;
use targets::Targets;

const SIGNALS: SourceKey = SourceKey(0);
const RULES: SourceKey = SourceKey(1);

/// The time after which names are looked up again.
const NAMES_LIVE: Duration = Duration::from_secs(30);
/// The longest pause between two looks, and after a run, whatever the interval.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The time that new backends have for their first answer. Then the others do not wait
/// for them any more.
const FIRST_ANSWER: Duration = Duration::from_secs(1);
/// The time after which a lock that others hold is told.
const BUSY_TOLD: Duration = Duration::from_secs(1);
/// The time after which the verdicts of an earlier watcher are too old to begin with.
const VERDICTS_LIVE: Duration = Duration::from_secs(60);

/// Reads the request, at first and again after SIGHUP.
pub type ReadRequest<'a> = &'a dyn Fn() -> Result<UncheckedRequest>;

/// Watches until SIGTERM or SIGINT; leaves the rules as they are. Each transition, and
/// each change of the situation, is one line that `tell` gets.
///
/// # Errors
/// When the request is wrong, when another watcher of the same name runs, or when the
/// kernel gives no descriptors for all this.
pub fn watch(read: ReadRequest, tell: &mut dyn FnMut(&str)) -> Result<()> {
    let mut watcher = Watcher::new(read, tell)?;
    while watcher.step()? {}
    watcher.notifier.stopping();
    Ok(())
}

struct Watcher<'a> {
    name: Name,
    state: State,
    /// The request that is in force.
    request: UncheckedRequest,
    read: ReadRequest<'a>,
    targets: Targets,
    /// True when these are the backends of the request, whose names did resolve.
    are_adopted: bool,
    /// The moment from which backends without a first answer count as down.
    patient_until: Instant,
    /// The moment from which others hold the lock.
    busy_since: Option<Instant>,
    names: Rc<Names>,
    prober: Prober,
    signals: Signals,
    events: Option<RuleEvents>,
    notifier: Notifier,
    log: Log<'a>,
    /// The kept request and the holds as they were last seen.
    stamps: (Stamp, Stamp),
    /// The kept request after the last run; `None` before the first, when the request of
    /// this watcher is the one that counts.
    kept: Option<Kept>,
    /// The number of changes of rules up to which ours are known to be right.
    generation: Option<u32>,
    /// The reasons to apply the request.
    pending: Pending,
    /// The end of the first hold, in seconds since 1970.
    first_end: Option<u64>,
    next_look: Instant,
    next_names: Instant,
    /// The moment from which the request may be applied again.
    next_run: Instant,
    _singleton: Singleton,
}

/// The text of the request that runs have kept; `None` if they have kept none.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Kept(Option<Vec<u8>>);

/// The reasons to apply the request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pending {
    /// A verdict, a hold or the request has changed.
    is_due: bool,
    /// Others may have changed the rules; that is looked at once an interval at most.
    is_suspected: bool,
    /// Somebody removed the balancer: nothing is applied until there is a request.
    is_removed: bool,
}

impl<'a> Watcher<'a> {
    fn new(read: ReadRequest<'a>, tell: &'a mut dyn FnMut(&str)) -> Result<Self> {
        let request = read()?;
        if request.state == DesiredState::Absent {
            bail!("state: `absent` leaves nothing to watch; say `apply` instead");
        }
        let name = request.name.clone();
        let singleton = Singleton::of(&name)?;
        let state = State::of(&name)?;
        let mut prober = Prober::new().context("no descriptor is left to probe with")?;
        let signals = Signals::open().context("cannot wait for signals")?;
        prober.add_source(&signals, SIGNALS)?;
        let events = RuleEvents::open().ok();
        if let Some(events) = &events {
            prober.add_source(events, RULES)?;
        }
        let now = Instant::now();
        let names = Rc::new(Names::default());
        let log = Log::new(&name, tell);
        let mut watcher = Self {
            targets: Targets::new(),
            are_adopted: false,
            patient_until: now,
            busy_since: None,
            stamps: state.stamps(),
            name,
            state,
            request,
            read,
            names,
            prober,
            signals,
            events,
            notifier: Notifier::from_environment(),
            log,
            kept: None,
            generation: None,
            pending: Pending {
                is_due: true,
                ..Pending::default()
            },
            first_end: None,
            next_look: now,
            next_names: now + NAMES_LIVE,
            next_run: now,
            _singleton: singleton,
        };
        let known = watcher.earlier_verdicts();
        watcher.adopt_targets(&known, now);
        Ok(watcher)
    }

    /// The verdicts of a watcher that ran until a moment ago.
    fn earlier_verdicts(&self) -> Vec<Checked> {
        let verdicts = self.state.verdicts().value;
        let is_recent = |verdicts: &Verdicts| verdicts.age(since_boot()) <= VERDICTS_LIVE;
        verdicts.filter(is_recent).unwrap_or_default().backends
    }

    /// Waits for the first thing that happens, and acts on it. Returns false when the
    /// service is to end.
    fn step(&mut self) -> Result<bool> {
        let mut results = Vec::new();
        let ready = self.prober.wait(Some(self.deadline()), &mut results)?;
        let now = Instant::now();
        for (id, result) in results {
            let Some(news) = self.targets.record(id, &result, now) else {
                continue;
            };
            news.line.iter().for_each(|line| self.log.say(line));
            self.pending.is_due = true;
            self.next_run = now;
        }
        if ready.contains(&SIGNALS) && !self.obey_signals() {
            return Ok(false);
        }
        if ready.contains(&RULES) {
            self.pending.is_suspected |= self.events.as_mut().is_none_or(RuleEvents::drain);
        }
        if now >= self.next_look {
            self.look(now);
        }
        self.targets.probe_due(&mut self.prober, now);
        self.act(now);
        self.notifier.alive();
        Ok(true)
    }

    fn deadline(&self) -> Instant {
        let due = [self.targets.next_due(), self.notifier.next_due()];
        let run = self.wants_to_run().then_some(self.next_run);
        let run = match self.targets.has_unknown() {
            true => run.map(|moment| moment.max(self.patient_until)),
            false => run,
        };
        let all = due.into_iter().chain([run]).flatten();
        all.fold(self.next_look, Instant::min)
    }

    /// Returns true if there is a reason to apply the request.
    fn wants_to_run(&self) -> bool {
        let Pending {
            is_due,
            is_suspected,
            is_removed,
        } = self.pending;
        is_due || (is_suspected && !is_removed)
    }

    /// Acts on signals; returns false when one of them ends the service.
    fn obey_signals(&mut self) -> bool {
        for signal in self.signals.take() {
            match signal {
                Signal::Terminate => return false,
                Signal::Reload => self.reload(),
            }
        }
        true
    }

    /// Reads the request again. One that is wrong is refused, and the old one goes on.
    fn reload(&mut self) {
        self.notifier.reloading();
        match self.read_again() {
            Ok(request) => {
                self.log.say("the request was read again");
                self.go_on_with(request, None);
            }
            Err(error) => self.log.say(&format!(
                "reload refused, the old request stays in force: {error:#}"
            )),
        }
        self.notifier.ready();
    }

    fn read_again(&self) -> Result<UncheckedRequest> {
        let request = (self.read)()?;
        if request.name != self.name {
            bail!(
                "name: it is `{}` now; start another watcher for that",
                request.name.as_str()
            );
        }
        if request.state == DesiredState::Absent {
            bail!("state: it is `absent` now; stop this watcher, and apply that");
        }
        request.resolve(&|name| self.names.lookup(name))?;
        Ok(request)
    }

    /// Takes a request over, with the verdicts about its backends that are known.
    fn go_on_with(&mut self, request: UncheckedRequest, kept: Option<Kept>) {
        self.request = request;
        self.kept = kept;
        self.pending = Pending {
            is_due: true,
            ..Pending::default()
        };
        self.next_run = Instant::now();
        self.adopt_targets(&[], self.next_run);
    }

    /// Checks the backends of the request from now on. Where names do not resolve, the
    /// former ones stay.
    fn adopt_targets(&mut self, known: &[Checked], now: Instant) {
        match self.request.resolve(&|name| self.names.lookup(name)) {
            Ok(request) => {
                if let Err(error) = self.prober.bypass_rules(health::are_led_astray(&request)) {
                    let problem = "checks may be balanced themselves, because of `local_traffic`";
                    self.log.problem(&format!("{problem}: {error}"));
                }
                self.targets.adopt(&request, known, &mut self.prober, now);
                self.patient_until = now + FIRST_ANSWER;
                self.are_adopted = true;
            }
            Err(error) => {
                self.log.problem(&error.to_string());
                self.are_adopted = false;
            }
        }
    }

    /// Looks at everything of which nobody tells: files, names, and on legacy the rules.
    fn look(&mut self, now: Instant) {
        self.next_look = now + self.targets.interval().min(LONGEST_PAUSE);
        let stamps = self.state.stamps();
        let is_hold_over = self
            .first_end
            .is_some_and(|end| end <= seconds_since_1970());
        if stamps != self.stamps || is_hold_over {
            self.stamps = stamps;
            self.pending.is_due = true;
            self.next_run = now;
        }
        if self.names.update() {
            self.adopt_targets(&[], now);
            self.pending.is_due = true;
        }
        if now >= self.next_names {
            self.next_names = now + NAMES_LIVE;
            self.names.refresh();
        }
        if self.generation.is_none() || self.generation != self.generation_now() {
            self.pending.is_suspected = true;
        }
        self.write_verdicts();
    }

    fn generation_now(&self) -> Option<u32> {
        self.host().ok()?.generation()
    }

    fn host(&self) -> Result<System> {
        System::open(self.request.variant.required(), self.request.wait)
    }

    /// Applies the request if there is a reason to, and nobody else is at it. New backends
    /// are given a moment for their first answer: a dead one would get connections.
    fn act(&mut self, now: Instant) {
        const BUSY: Duration = Duration::from_millis(50);
        let must_wait = self.targets.has_unknown() && now < self.patient_until;
        if !self.wants_to_run() || now < self.next_run || must_wait {
            return;
        }
        if !self.are_adopted {
            self.adopt_targets(&[], now);
            if self.targets.has_unknown() {
                return;
            }
        }
        self.write_verdicts();
        match self.host().and_then(|host| host.try_lock()) {
            Ok(Some(lock)) => {
                self.busy_since = None;
                self.next_run = now + BUSY;
                self.apply(lock);
            }
            Ok(None) => {
                self.next_run = now + BUSY;
                if *self.busy_since.get_or_insert(now) + BUSY_TOLD < now {
                    self.log
                        .problem("another run holds the lock; changes wait for it");
                }
            }
            Err(error) => {
                self.log.problem(&format!("{error:#}"));
                self.next_run = now + self.targets.interval();
            }
        }
    }

    /// Applies the request while nobody else writes.
    fn apply(&mut self, lock: Rc<Lock>) {
        if !self.take_over() {
            return;
        }
        let before = self.generation_now();
        let invocation = Invocation {
            request: self.request.clone(),
            mode: RunMode::Apply,
            diff: false,
        };
        let surroundings = Surroundings {
            lock: Some(lock),
            verdicts: Some(Rc::new(self.targets.checked_so_far())),
            names: Some(Rc::clone(&self.names)),
            ..Surroundings::default()
        };
        let report = run_within(&invocation, &surroundings);
        self.next_run = Instant::now() + self.targets.interval().min(LONGEST_PAUSE);
        self.pending = Pending::default();
        // The rules are known to be right only if nobody wrote since they were read.
        let after = self.generation_now();
        self.generation = after.filter(|_| before == after && !report.failed);
        self.kept = Some(Kept(self.state.kept_request().ok().flatten()));
        self.stamps = self.state.stamps();
        self.first_end = self.first_end_of_a_hold();
        self.tell(&report);
        if report.failed {
            self.pending.is_due = true;
        } else {
            self.notifier.ready();
        }
        self.notifier.status(&self.targets.summary());
    }

    /// Goes on with the request of a run that came meanwhile. Returns false if that
    /// removed the balancer.
    fn take_over(&mut self) -> bool {
        let Some(known) = &self.kept else {
            return true;
        };
        let kept = match self.state.kept_request() {
            Ok(kept) if kept == known.0 => {
                self.pending.is_due = false;
                return !self.pending.is_removed;
            }
            Ok(kept) => kept,
            Err(error) => {
                self.log.problem(&format!("{error:#}"));
                return true;
            }
        };
        let Some(text) = kept else {
            if self.are_rules_there() {
                // Only the file is gone; the run keeps the request again.
                return true;
            }
            self.log.say("a run removed the balancer; it is left alone until one sets it up, or until SIGHUP");
            self.pending = Pending {
                is_removed: true,
                ..Pending::default()
            };
            self.kept = Some(Kept(None));
            return false;
        };
        match UncheckedRequest::parse(&text) {
            Ok(request) if request.name != self.name || request.state == DesiredState::Absent => {
                let problem = "the kept request is not about this balancer; it is replaced";
                self.log.problem(problem);
                true
            }
            Ok(request) if text != self.request.to_json() => {
                self.log
                    .say("a run applied another request; it is the one that is watched now");
                self.go_on_with(request, Some(Kept(Some(text))));
                // New backends are checked first.
                !self.targets.has_unknown()
            }
            Ok(_) => true,
            Err(error) => {
                self.log
                    .problem(&format!("the kept request is broken: {error}"));
                true
            }
        }
    }

    /// Returns true unless it is certain that nothing of the balancer is there.
    fn are_rules_there(&self) -> bool {
        let Ok(host) = self.host() else {
            return true;
        };
        let families = Family::BOTH.into_iter();
        let query = |family| Query {
            family,
            scope: Scope::Only(Table::Nat),
            counters: false,
        };
        let queries = families.filter(|family| host.supports(*family)).map(query);
        let rulesets = host.begin_read(&self.name, queries.collect()).finish();
        rulesets
            .into_iter()
            .any(|ruleset| ruleset.map_or(true, |found| !found.is_empty()))
    }

    fn first_end_of_a_hold(&self) -> Option<u64> {
        let now = seconds_since_1970();
        let holds = self.state.holds().value;
        holds.active(now).filter_map(|hold| hold.until).min()
    }

    /// Tells of a run that failed or changed something, and of new warnings.
    fn tell(&mut self, report: &Report) {
        if report.failed {
            self.log.problem(&report.msg);
            return;
        }
        self.log.no_problem();
        if report.changed {
            self.log.say(&report.msg);
        }
        self.log.warnings(&report.warnings);
    }

    fn write_verdicts(&mut self) {
        let verdicts = Verdicts::of_now(self.targets.interval(), self.targets.checked());
        if let Err(error) = self.state.store_verdicts(&verdicts) {
            self.log
                .problem(&format!("cannot tell other runs the verdicts: {error:#}"));
        }
    }
}
