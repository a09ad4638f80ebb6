//! The backends that are checked, and the verdicts about them.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::health::{self, tracker::Tracker};
use crate::host::{Probe, ProbeFailure, Prober};
use crate::host::{seconds_since_1970, since_boot};
use crate::request::{Health, Request, Verdict};
use crate::state::Checked;

/// The backends that are checked.
pub(super) struct Targets {
    list: Vec<Target>,
    tracker: Tracker,
    interval: Duration,
}

/// A verdict that is a new one.
pub(super) struct News {
    /// The transition, unless it is the first verdict and a good one.
    pub line: Option<String>,
}

struct Target {
    probe: Probe,
    health: Health,
    checked: Checked,
    /// The balancer, for messages.
    prefix: String,
}

impl Targets {
    pub fn new() -> Self {
        Self {
            list: Vec::new(),
            tracker: Tracker::new(0),
            interval: Health::default().interval,
        }
    }

    /// Checks the backends of a request from now on. Those that were checked before keep
    /// their verdicts; of the others some may be `known`.
    pub fn adopt(
        &mut self,
        request: &Request,
        known: &[Checked],
        prober: &mut Prober,
        now: Instant,
    ) {
        (0..self.list.len()).for_each(|id| prober.cancel(id));
        let before: Vec<Checked> = known.iter().cloned().chain(self.checked()).collect();
        let mut before: HashMap<_, Checked> = before
            .into_iter()
            .map(|checked| (checked.backend(), checked))
            .collect();
        // Watchers that are started at the same time do not check in step.
        let seed = u64::from(since_boot().subsec_nanos()) ^ u64::from(std::process::id()) << 32;
        self.tracker = Tracker::new(seed);
        self.list.clear();
        for target in health::targets(request) {
            let Some(probe) = target.probe() else {
                continue;
            };
            let fresh = target.checked(Verdict::Up, None);
            let earlier = before.remove(&fresh.backend());
            let verdict = earlier.as_ref().map(|checked| checked.health);
            self.tracker.add(target.health, verdict, now);
            self.list.push(Target {
                probe,
                health: target.health.clone(),
                checked: earlier.unwrap_or(fresh),
                prefix: target.balancer.worded(""),
            });
        }
        let intervals = self.list.iter().map(|target| target.health.interval);
        self.interval = intervals.min().unwrap_or(Health::default().interval);
    }

    /// The shortest time between two checks of a backend.
    pub fn interval(&self) -> Duration {
        self.interval
    }

    pub fn next_due(&self) -> Option<Instant> {
        self.tracker.next_due()
    }

    /// Returns true if there is a backend without a verdict.
    pub fn has_unknown(&self) -> bool {
        self.tracker.has_unknown()
    }

    pub fn probe_due(&mut self, prober: &mut Prober, now: Instant) {
        for id in self.tracker.due(now) {
            prober.start(id, &self.list[id].probe);
        }
    }

    /// Records the result of a check. Returns news if the verdict is a new one.
    pub fn record(
        &mut self,
        id: usize,
        result: &Result<(), ProbeFailure>,
        now: Instant,
    ) -> Option<News> {
        let target = self.list.get_mut(id)?;
        let was_known = self.tracker.verdict(id).is_some();
        let verdict = match result {
            Err(failure) if !failure.blames_the_backend() => {
                self.tracker.skip(id, now);
                return None;
            }
            result => self.tracker.record(id, result.is_ok(), now)?,
        };
        let reason = result.as_ref().err().map(ToString::to_string);
        let Target {
            health,
            checked,
            prefix,
            ..
        } = target;
        let endpoint = checked.endpoint();
        let line = match (verdict, &reason) {
            (Verdict::Up, _) if !was_known => None,
            (Verdict::Up, _) => {
                let rise = health.rise;
                Some(format!(
                    "{prefix}backend `{endpoint}` is up, after {rise} good checks in a row"
                ))
            }
            (Verdict::Down, reason) => {
                let (fall, reason) = (health.fall, reason.as_deref().unwrap_or_default());
                Some(format!(
                    "{prefix}backend `{endpoint}` is down, after {fall} failed checks in a row: {reason}"
                ))
            }
        };
        checked.health = verdict;
        checked.reason = reason;
        checked.since = seconds_since_1970();
        Some(News { line })
    }

    /// The verdicts that there are.
    pub fn checked(&self) -> Vec<Checked> {
        let list = self.list.iter().enumerate();
        let known = list.filter(|(id, _)| self.tracker.verdict(*id).is_some());
        known.map(|(_, target)| target.checked.clone()).collect()
    }

    /// The same, with the backends that have not answered yet as down.
    pub fn checked_so_far(&self) -> Vec<Checked> {
        let list = self.list.iter().enumerate();
        let so_far = |(id, target): (usize, &Target)| match self.tracker.verdict(id) {
            Some(_) => target.checked.clone(),
            None => Checked {
                health: Verdict::Down,
                reason: Some("no answer yet".to_owned()),
                ..target.checked.clone()
            },
        };
        list.map(so_far).collect()
    }

    /// `3 of 4 backends are up`
    pub fn summary(&self) -> String {
        let up = self
            .list
            .iter()
            .filter(|target| target.checked.health == Verdict::Up);
        match self.list.len() {
            0 => "no backend is checked".to_owned(),
            count => format!("{} of {count} backends are up", up.count()),
        }
    }
}
