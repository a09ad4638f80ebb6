//! The outcome of a run in the terms of the contract. Ansible and plain JSON
//! send it as it is; the other frontends word it themselves.

mod diff;
mod set;

use std::borrow::Cow;
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};

use crate::converge::outcome::{Outcome, RunMode, Steps};
use crate::diff::change::{Change, Kind};
use crate::effects::Effect;
use crate::effects::draining::Remaining;
use crate::netfilter::ruleset::SavedRule;
use crate::netfilter::shares::shares_of_chain;
use crate::netfilter::statistic::Share;
use crate::netfilter::{Family, Table, Variant};
use crate::request::{Balancer, Desired, DesiredState, Name, Pool, Request, Verdict};
use crate::schedule::Arrangement;
pub use diff::Diff;

/// The result of a run.
#[derive(Debug, Default, Serialize, JsonSchema)]
#[schemars(title = "iptables_balance result")]
pub struct Report {
    /// True if something was changed, or would be in check mode.
    pub changed: bool,
    /// True if the desired state was not reached.
    pub failed: bool,
    /// The outcome in one sentence.
    pub msg: String,
    /// Warnings: things that work, but may not be what you want.
    pub warnings: Vec<String>,
    /// The name of the balancer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The state that was requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<DesiredState>,
    /// The iptables variant that was used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<Variant>,
    /// The version of iptables, such as `1.8.9`. Left out where its dump names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iptables_version: Option<String>,
    /// The changes that were made, or would be made in check mode, in order.
    #[schemars(with = "Vec<ReportedChange<'_>>")]
    pub changes: Prewritten<Steps>,
    /// The share of each backend, computed from the rules as they are after the run.
    #[schemars(with = "Vec<ReportedShare>")]
    pub distribution: Prewritten<Vec<ReportedShare>>,
    /// The balancers of a set, in the order of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balancers: Option<Vec<ReportedBalancer>>,
    /// The connections that backends of weight 0, held and removed ones have left, if `drain_timeout` asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draining: Option<Vec<Remaining>>,
    /// The rules and settings of the balancer before and after, if a diff was requested. Of a set, what changes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff: Option<Diff>,
    /// The source of the report. It lives as long as the report, see
    /// `frontend::invocation::send`.
    #[serde(skip)]
    source: Option<(Request, Outcome)>,
}

/// One change. Keys that do not apply to it are left out.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct ReportedChange<'a> {
    /// The family of the rules, the sysctl or the connections. Left out for a file that belongs to no family.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<Family>,
    /// The table of the rule or chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<Table>,
    /// The kind of change.
    pub action: Kind,
    /// The chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chain: Option<&'a str>,
    /// The rule that was added or deleted, as `iptables-save` spells it.
    /// With `set_sysctl` the setting and its new value, with `write_file` the path, with `delete_connections`
    /// a filter in the spelling of `conntrack`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<Cow<'a, str>>,
    /// The rule that was replaced, or the setting and its former value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<Cow<'a, str>>,
}

/// A balancer of a set.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct ReportedBalancer {
    /// Its name in the set.
    pub name: String,
    /// True if something of it was changed, or would be in check mode.
    pub changed: bool,
}

/// The share of one backend.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct ReportedShare {
    /// Its balancer, in a set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balancer: Option<String>,
    /// The family of its connections.
    pub family: Family,
    /// Its address.
    pub address: std::net::IpAddr,
    /// Its port. Left out where connections keep the port that they were addressed to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Its weight as requested.
    pub weight: u32,
    /// Its share of its family's new connections, 0 to 1: the double nearest to the exact share.
    pub share: f64,
    /// True if it gets new connections.
    pub in_service: bool,
    /// The verdict of its health checks. Left out where it is not checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<Verdict>,
}

/// A part of the report that may be JSON already.
///
/// With thousands of backends writing JSON takes a tenth of a run. It is done
/// while iptables works, where that is possible (`benches/program.py`).
#[derive(Clone, Debug, Default)]
pub struct Prewritten<T> {
    /// The part itself.
    pub value: T,
    json: Option<Box<RawValue>>,
}

impl<T: Serialize> Serialize for Prewritten<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.json {
            Some(json) => json.serialize(serializer),
            None => self.value.serialize(serializer),
        }
    }
}

/// The JSON of planned shares and steps, written before the outcome is known.
#[derive(Debug, Default)]
pub struct Prewriter {
    shares: OnceCell<(Vec<ReportedShare>, Option<Box<RawValue>>)>,
    steps: OnceCell<Option<Box<RawValue>>>,
}

impl Prewriter {
    /// Writes the shares that the plan gives, once.
    pub fn write_shares(&self, request: &Request) {
        self.shares.get_or_init(|| {
            let shares = planned_shares(request);
            let json = to_raw_value(&shares).ok();
            (shares, json)
        });
    }

    /// Writes the steps that are about to be applied, once.
    pub fn write_steps(&self, steps: &Steps) {
        self.steps.get_or_init(|| to_raw_value(steps).ok());
    }
}

impl Serialize for Steps {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.reported())
    }
}

impl Steps {
    /// The steps in the terms of the contract.
    pub fn reported(&self) -> impl Iterator<Item = ReportedChange<'_>> {
        let changes = self.changes.iter().map(ReportedChange::from);
        changes.chain(self.effects.iter().map(ReportedChange::from))
    }
}

/// The shares that the plan gives, in the order of the request.
fn planned_shares(request: &Request) -> Vec<ReportedShare> {
    // Balancers with the same weights have the very same arrangement (`benches/sets.py`).
    let mut last: Option<(&Arc<Arrangement>, Vec<Share>)> = None;
    shares(request, |_, pool| match &last {
        Some((arrangement, known)) if Arc::ptr_eq(arrangement, &pool.arrangement) => known.clone(),
        _ => {
            let found = pool.arrangement.shares(pool.backends.len());
            last = Some((&pool.arrangement, found.clone()));
            found
        }
    })
}

/// The shares that the observed rules give.
fn observed_shares(request: &Request, outcome: &Outcome) -> Vec<ReportedShare> {
    shares(request, |balancer, pool| {
        let ruleset = outcome.after.rules.get(&pool.family);
        let owned = ruleset.map(|ruleset| ruleset.owned(Table::Nat));
        let found = owned.map(|owned| shares_of_chain(owned, &balancer.chain));
        let found = found.unwrap_or_default();
        let backends = pool.backends.iter();
        backends
            .map(|backend| found.get(&backend.endpoint).copied().unwrap_or(Share::NONE))
            .collect()
    })
}

fn shares<'a>(
    request: &'a Request,
    mut shares: impl FnMut(&'a Balancer, &'a Pool) -> Vec<Share>,
) -> Vec<ReportedShare> {
    let mut all = Vec::new();
    for (balancer, pool) in request.pools() {
        let of_backend = pool.backends.iter().zip(shares(balancer, pool));
        all.extend(of_backend.map(|(backend, share)| ReportedShare {
            balancer: balancer.name.clone(),
            family: pool.family,
            address: backend.endpoint.address,
            port: backend.endpoint.port,
            weight: backend.weight,
            share: share.as_f64(),
            in_service: share != Share::NONE,
            health: backend.health,
        }));
    }
    all
}

impl Report {
    /// The report of a run that failed before its request was known.
    #[must_use]
    pub fn failure(reason: impl Into<String>) -> Self {
        Self {
            failed: true,
            msg: reason.into(),
            ..Self::default()
        }
    }

    /// The report of a run that failed before the host was read.
    #[must_use]
    pub fn unread(name: &Name, state: DesiredState, reason: impl Into<String>) -> Self {
        Self {
            name: Some(name.as_str().to_owned()),
            state: Some(state),
            ..Self::failure(reason)
        }
    }

    /// The report of an outcome.
    #[must_use]
    pub fn new(
        request: Request,
        mut outcome: Outcome,
        prewriter: Prewriter,
        mode: RunMode,
    ) -> Self {
        let steps = std::mem::take(&mut outcome.steps);
        let name = request.name.as_str().to_owned();
        Self {
            changed: !steps.is_empty(),
            failed: outcome.failure.is_some(),
            msg: match &outcome.failure {
                Some(failure) => failure.clone(),
                None => sentence(&request, &outcome, &steps, mode),
            },
            warnings: outcome.warnings.clone(),
            state: Some(request.state()),
            variant: Some(outcome.variant),
            iptables_version: outcome.version().map(str::to_owned),
            diff: None,
            draining: None,
            balancers: set::balancers(&request, &steps),
            distribution: distribution(&request, &outcome, prewriter.shares),
            changes: Prewritten {
                json: prewriter
                    .steps
                    .into_inner()
                    .flatten()
                    .filter(|_| went_as_planned(&outcome, &steps)),
                value: steps,
            },
            name: Some(name),
            source: Some((request, outcome)),
        }
    }

    /// The balancers of a set that changes are about, each with their number.
    #[must_use]
    pub fn changed_balancers(&self) -> BTreeMap<&str, usize> {
        let name = self.source.as_ref().map(|(request, _)| &request.name);
        let steps = &self.changes.value;
        name.map_or_else(BTreeMap::new, |name| set::changed_balancers(name, steps))
    }

    /// Adds the state before and after.
    #[must_use]
    pub fn with_diff(mut self) -> Self {
        let source = self.source.as_ref();
        let steps = &self.changes.value;
        self.diff = source.map(|(request, outcome)| Diff::new(request, outcome, steps));
        self
    }

    /// Adds the connections that are left.
    #[must_use]
    pub fn with_draining(self, draining: Option<Vec<Remaining>>) -> Self {
        Self { draining, ..self }
    }

    /// Writes the report as one line of JSON.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_json(&self, out: &mut impl Write) -> io::Result<()> {
        const BUFFER: usize = 1 << 16;
        let mut out = io::BufWriter::with_capacity(BUFFER, out);
        serde_json::to_writer(&mut out, self)?;
        out.write_all(b"\n")?;
        out.flush()
    }
}

/// The steps at the first attempt are the steps that were applied. The end of
/// connections is known only afterwards.
fn went_as_planned(outcome: &Outcome, steps: &Steps) -> bool {
    let ends_connections = |effect: &Effect| matches!(effect, Effect::Disconnect(_));
    outcome.failure.is_none()
        && outcome.attempts == 1
        && !steps.effects.iter().any(ends_connections)
}

/// After success the planned shares are those of the rules, which were verified.
fn distribution(
    request: &Request,
    outcome: &Outcome,
    prewritten: OnceCell<(Vec<ReportedShare>, Option<Box<RawValue>>)>,
) -> Prewritten<Vec<ReportedShare>> {
    if outcome.failure.is_some() {
        let value = observed_shares(request, outcome);
        return Prewritten { value, json: None };
    }
    let (value, json) = prewritten
        .into_inner()
        .unwrap_or_else(|| (planned_shares(request), None));
    Prewritten { value, json }
}

impl<'a> From<&'a Change> for ReportedChange<'a> {
    fn from(change: &'a Change) -> Self {
        Self {
            family: Some(change.family),
            table: Some(change.table),
            action: change.action.kind(),
            chain: Some(&change.chain),
            rule: change.action.rule().map(SavedRule::shown),
            before: change.action.before().map(SavedRule::shown),
        }
    }
}

impl<'a> From<&'a Effect> for ReportedChange<'a> {
    fn from(effect: &'a Effect) -> Self {
        Self {
            family: effect.family(),
            table: None,
            action: effect.kind(),
            chain: None,
            rule: Some(effect.shown().into()),
            before: effect.before().map(Cow::from),
        }
    }
}

fn sentence(request: &Request, outcome: &Outcome, steps: &Steps, mode: RunMode) -> String {
    let name = request.name.as_str();
    let changes = steps.len();
    let counted = match changes {
        0 => String::new(),
        1 => ", with 1 change".to_owned(),
        _ => format!(", with {changes} changes"),
    };
    let mut rulesets = outcome.before.rules.values();
    let existed = rulesets.any(|found| !found.is_empty());
    match (&request.desired, changes == 0, mode) {
        (Desired::Absent, true, _) => format!("there is no balancer `{name}`"),
        (Desired::Absent, false, RunMode::Apply) => {
            format!("removed the balancer `{name}`{counted}")
        }
        (Desired::Absent, false, RunMode::Check) => {
            format!("would remove the balancer `{name}`{counted}")
        }
        (Desired::Balancer(balancer), true, _) => {
            format!(
                "the balancer `{name}` is as it should be, over {}",
                pool(balancer)
            )
        }
        (Desired::Balancer(balancer), false, RunMode::Apply) => {
            let done = if existed { "updated" } else { "set up" };
            format!(
                "the balancer `{name}` was {done} over {}{counted}",
                pool(balancer)
            )
        }
        (Desired::Balancer(balancer), false, RunMode::Check) => {
            let to_do = if existed { "update" } else { "set up" };
            format!(
                "would {to_do} the balancer `{name}` over {}{counted}",
                pool(balancer)
            )
        }
        (Desired::Set(balancers), true, _) => {
            format!(
                "the set `{name}` is as it should be, with {}",
                set::size(balancers)
            )
        }
        (Desired::Set(balancers), false, RunMode::Apply) => {
            let done = if existed { "updated" } else { "set up" };
            let size = set::size(balancers);
            let told = set::told(request, steps, existed);
            format!("the set `{name}` was {done} with {size}{told}{counted}")
        }
        (Desired::Set(balancers), false, RunMode::Check) => {
            let to_do = if existed { "update" } else { "set up" };
            let size = set::size(balancers);
            let told = set::told(request, steps, existed);
            format!("would {to_do} the set `{name}` with {size}{told}{counted}")
        }
    }
}

fn pool(balancer: &Balancer) -> String {
    backends(balancer.pools.iter().map(|pool| pool.backends.len()).sum())
}

fn backends(count: usize) -> String {
    match count {
        0 => "no backend".to_owned(),
        1 => "1 backend".to_owned(),
        more => format!("{more} backends"),
    }
}
