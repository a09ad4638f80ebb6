//! The decision which backends of a pool get new connections.
//!
//! | backends | get connections |
//! |---|---|
//! | of weight 0, held | never |
//! | up, no backup | while any of these is up |
//! | up, backup | while no other is up |
//! | every one that is no backup | when too little is healthy (`panic_threshold`) |

use std::collections::{BTreeMap, HashMap, HashSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::backend::Backend;
use super::health::PanicThreshold;
use crate::netfilter::Endpoint;

/// The place of a backend in its pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Service {
    /// It gets its share of new connections.
    #[default]
    InService,
    /// It has weight 0.
    Drained,
    /// An operator took it out of service.
    Held,
    /// Its health checks failed.
    Down,
    /// It is a backup, and others are in service.
    Reserve,
}

/// The result of health checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Health")]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It is healthy.
    Up,
    /// It is not.
    Down,
}

/// Everything that decides about service and is not in the request, by balancer:
/// `None` is the only one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Circumstances(pub BTreeMap<Option<String>, Known>);

/// The same for the backends of one balancer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The backends that are held.
    pub held: HashSet<Endpoint>,
    /// The verdicts of health checks. A backend without one counts as up.
    pub verdicts: HashMap<Endpoint, Verdict>,
}

impl Circumstances {
    /// The circumstances of a balancer, to be added to.
    pub fn of(&mut self, balancer: Option<&str>) -> &mut Known {
        self.0.entry(balancer.map(str::to_owned)).or_default()
    }
}

/// Decides about the backends of one pool. Without `panic_threshold` no health is
/// asked for.
pub(super) fn decide(
    backends: &mut [Backend],
    known: &Known,
    panic_threshold: Option<PanicThreshold>,
) {
    for backend in backends.iter_mut() {
        let verdict = known.verdicts.get(&backend.endpoint).copied();
        backend.health = panic_threshold.and(verdict);
        backend.service = match (known.held.contains(&backend.endpoint), backend.weight) {
            (true, _) => Service::Held,
            (false, 0) => Service::Drained,
            (false, _) => Service::InService,
        };
    }
    let is_down = |backend: &Backend| backend.health == Some(Verdict::Down);
    let threshold = panic_threshold.unwrap_or(PanicThreshold::Never);
    let is_panic = must_ignore_health(backends, threshold);
    let mut eligible: Vec<&mut Backend> = backends
        .iter_mut()
        .filter(|backend| backend.service == Service::InService)
        .collect();
    if !is_panic {
        for backend in eligible.iter_mut().filter(|backend| is_down(backend)) {
            backend.service = Service::Down;
        }
        eligible.retain(|backend| backend.service == Service::InService);
    }
    if eligible.iter().any(|backend| !backend.backup) {
        for backend in eligible.iter_mut().filter(|backend| backend.backup) {
            backend.service = Service::Reserve;
        }
    }
}

/// Returns true if too little of the weight is healthy. Backups that are healthy
/// come before that when nothing else is.
fn must_ignore_health(backends: &[Backend], threshold: PanicThreshold) -> bool {
    let PanicThreshold::PerCent(per_cent) = threshold else {
        return false;
    };
    let eligible = || {
        let backends = backends.iter();
        backends.filter(|backend| backend.service == Service::InService)
    };
    let healthy = || eligible().filter(|backend| backend.health != Some(Verdict::Down));
    let weight = |backend: &Backend| u64::from(backend.weight);
    let whole: u64 = eligible().map(weight).sum();
    let of_healthy: u64 = healthy().map(weight).sum();
    let serves_by_backup = of_healthy > 0 && healthy().all(|backend| backend.backup);
    !serves_by_backup && u128::from(of_healthy) * 100 <= u128::from(whole) * u128::from(per_cent)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use super::*;

    const UP: Option<Verdict> = Some(Verdict::Up);
    const DOWN: Option<Verdict> = Some(Verdict::Down);
    const PERCENT: fn(u32) -> Option<PanicThreshold> = |of| Some(PanicThreshold::PerCent(of));

    /// A backend: its weight, backup, its verdict, held.
    type Case = (u32, bool, Option<Verdict>, bool);

    fn decided(cases: &[Case], threshold: Option<PanicThreshold>) -> String {
        let endpoint = |at: usize| Endpoint {
            address: IpAddr::V4(Ipv4Addr::new(192, 0, 2, u8::try_from(at).unwrap())),
            port: Some(80),
        };
        let mut known = Known::default();
        let mut backends = Vec::new();
        for (at, (weight, backup, verdict, held)) in cases.iter().enumerate() {
            backends.push(Backend {
                backup: *backup,
                ..Backend::new(endpoint(at), *weight)
            });
            if let Some(verdict) = verdict {
                known.verdicts.insert(endpoint(at), *verdict);
            }
            if *held {
                known.held.insert(endpoint(at));
            }
        }
        decide(&mut backends, &known, threshold);
        let letter = |backend: &Backend| match backend.service {
            Service::InService => 'S',
            Service::Drained => '0',
            Service::Held => 'H',
            Service::Down => 'D',
            Service::Reserve => 'R',
        };
        backends.iter().map(letter).collect()
    }

    #[test]
    fn a_backup_serves_only_while_no_other_does() {
        let backup = (1, true, None, false);
        assert_eq!(decided(&[(1, false, None, false), backup], None), "SR");
        assert_eq!(decided(&[(0, false, None, false), backup], None), "0S");
        assert_eq!(decided(&[(1, false, None, true), backup], None), "HS");
        assert_eq!(
            decided(&[(1, false, DOWN, false), backup], PERCENT(0)),
            "DS"
        );
        assert_eq!(decided(&[backup, backup], None), "SS");
    }

    #[test]
    fn health_is_ignored_when_no_more_than_the_threshold_is_healthy() {
        let (up, down) = ((1, false, UP, false), (1, false, DOWN, false));
        assert_eq!(decided(&[up, down], PERCENT(0)), "SD");
        assert_eq!(decided(&[down, down], PERCENT(0)), "SS");
        assert_eq!(decided(&[up, down], PERCENT(49)), "SD");
        assert_eq!(decided(&[up, down], PERCENT(50)), "SS");
        assert_eq!(decided(&[up, down, down], PERCENT(33)), "SDD");
        assert_eq!(decided(&[up, down, down], PERCENT(34)), "SSS");
        assert_eq!(decided(&[down, down], Some(PanicThreshold::Never)), "DD");
    }

    #[test]
    fn held_backends_and_those_of_weight_0_do_not_count_for_the_threshold() {
        let (up, down) = ((1, false, UP, false), (1, false, DOWN, false));
        let (held, drained) = ((9, false, UP, true), (0, false, UP, false));
        assert_eq!(decided(&[held, drained, down], PERCENT(0)), "H0S");
        assert_eq!(
            decided(&[(9, false, DOWN, true), up, down], PERCENT(40)),
            "HSD"
        );
    }

    #[test]
    fn healthy_backups_come_before_panic_and_are_part_of_the_weight() {
        let (up, down) = ((1, false, UP, false), (1, false, DOWN, false));
        let (backup, dead) = ((1, true, UP, false), (1, true, DOWN, false));
        assert_eq!(decided(&[down, down, backup], PERCENT(50)), "DDS");
        assert_eq!(decided(&[down, down, dead], PERCENT(0)), "SSR");
        assert_eq!(decided(&[up, down, dead, dead], PERCENT(30)), "SSRR");
        assert_eq!(decided(&[up, down, backup, dead], PERCENT(30)), "SDRD");
        assert_eq!(decided(&[dead, dead], PERCENT(0)), "SS");
    }

    #[test]
    fn without_health_checks_verdicts_do_not_count() {
        assert_eq!(
            decided(&[(1, false, DOWN, false), (1, false, UP, false)], None),
            "SS"
        );
    }
}
