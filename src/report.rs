//! The outcome of a run in the terms of the contract. Ansible and plain JSON
//! send it as it is; the other frontends word it themselves.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;

use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};

use crate::converge::outcome::{HostState, Outcome, RunMode, Steps};
use crate::diff::change::{Change, Kind};
use crate::effects::{Effect, SavedFile};
use crate::host::forwarding_sysctl;
use crate::netfilter::ruleset::{Chain, OwnedTable, SavedRule};
use crate::netfilter::shares::shares_of_chain;
use crate::netfilter::statistic::Share;
use crate::netfilter::{Family, Table, Variant};
use crate::request::{Balancer, Desired, DesiredState, Name, Pool, Request};

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
    /// The rules and settings of the balancer before and after, if a diff was requested.
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

/// The share of one backend.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct ReportedShare {
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
    shares(request, |pool| pool.arrangement.shares(pool.backends.len()))
}

/// The shares that the observed rules give.
fn observed_shares(request: &Request, outcome: &Outcome) -> Vec<ReportedShare> {
    shares(request, |pool| {
        let ruleset = outcome.after.rules.get(&pool.family);
        let owned = ruleset.map(|ruleset| ruleset.owned(Table::Nat));
        let found = owned.map(|owned| shares_of_chain(owned, request.name.as_str()));
        let found = found.unwrap_or_default();
        let backends = pool.backends.iter();
        backends
            .map(|backend| found.get(&backend.endpoint).copied().unwrap_or(Share::NONE))
            .collect()
    })
}

fn shares(request: &Request, shares: impl Fn(&Pool) -> Vec<Share>) -> Vec<ReportedShare> {
    let pools = request
        .balancer()
        .map_or(&[][..], |balancer| &balancer.pools);
    let of_pool = |pool: &Pool| {
        let of_backend = pool.backends.iter().zip(shares(pool));
        let reported = of_backend.map(|(backend, share)| ReportedShare {
            family: pool.family,
            address: backend.endpoint.address,
            port: backend.endpoint.port,
            weight: backend.weight,
            share: share.as_f64(),
        });
        reported.collect::<Vec<_>>()
    };
    pools.iter().flat_map(of_pool).collect()
}

/// Before and after, in the shape of Ansible's `--diff`.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Diff {
    pub before: String,
    pub after: String,
    pub before_header: String,
    pub after_header: String,
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
                None => sentence(&request, &outcome, steps.len(), mode),
            },
            warnings: outcome.warnings.clone(),
            state: Some(request.state()),
            variant: Some(outcome.variant),
            iptables_version: outcome.version().map(str::to_owned),
            diff: None,
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

    /// Adds the state before and after.
    #[must_use]
    pub fn with_diff(mut self) -> Self {
        self.diff = self.source.as_ref().map(|(request, outcome)| {
            let steps = &self.changes.value;
            Diff {
                before: owned_text(&outcome.before, steps, Moment::Before),
                after: owned_text(&outcome.after, steps, Moment::After),
                before_header: format!("{} (before)", request.name.as_str()),
                after_header: format!("{} (after)", request.name.as_str()),
            }
        });
        self
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

fn sentence(request: &Request, outcome: &Outcome, changes: usize, mode: RunMode) -> String {
    let name = request.name.as_str();
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
        (Desired::Present(balancer), true, _) => {
            format!(
                "the balancer `{name}` is as it should be, over {}",
                pool(balancer)
            )
        }
        (Desired::Present(balancer), false, RunMode::Apply) => {
            let done = if existed { "updated" } else { "set up" };
            format!(
                "the balancer `{name}` was {done} over {}{counted}",
                pool(balancer)
            )
        }
        (Desired::Present(balancer), false, RunMode::Check) => {
            let to_do = if existed { "update" } else { "set up" };
            format!(
                "would {to_do} the balancer `{name}` over {}{counted}",
                pool(balancer)
            )
        }
    }
}

fn pool(balancer: &Balancer) -> String {
    match balancer.pools.iter().map(|pool| pool.backends.len()).sum() {
        0 => "no backend".to_owned(),
        1 => "1 backend".to_owned(),
        more => format!("{more} backends"),
    }
}

/// The side of a diff. Connections exist on the first alone.
#[derive(Clone, Copy, PartialEq)]
enum Moment {
    Before,
    After,
}

/// The owned rules as `iptables-save` prints them, without counters, and every
/// other state that is about to change.
fn owned_text(state: &HostState, steps: &Steps, moment: Moment) -> String {
    let mut text = String::new();
    for (family, ruleset) in &state.rules {
        for (table, owned) in &ruleset.tables {
            let head = format!("{} {}", family.as_str(), table.as_str());
            let refused_at = ruleset
                .forward_refuses_at
                .filter(|_| *table == Table::Filter);
            owned_table(&head, owned, refused_at, &mut text);
        }
    }
    for effect in &steps.effects {
        match effect {
            Effect::Forwarding { family, .. } => {
                let on = state.settings.forwarding.get(family) == Some(&true);
                let _ = writeln!(
                    text,
                    "# sysctl\n{} = {}",
                    forwarding_sysctl(*family),
                    u8::from(on)
                );
            }
            Effect::Write { path, .. } => {
                if let Some(file) = state.settings.files.get(path) {
                    file_text(path, file, &mut text);
                }
            }
            Effect::Disconnect(gone) => {
                let shown = match moment {
                    Moment::Before => gone.shown() + "\n",
                    Moment::After => String::new(),
                };
                let _ = write!(text, "# {} connections\n{shown}", gone.family.as_str());
            }
        }
    }
    text
}

/// The owned rules in a file, or the whole text of a file of sysctls.
fn file_text(path: &Path, file: &SavedFile, text: &mut String) {
    let path = path.display();
    match &file.ruleset {
        Some(ruleset) => {
            for (table, owned) in &ruleset.tables {
                owned_table(&format!("{path} {}", table.as_str()), owned, None, text);
            }
        }
        None => {
            let settings = file.text.as_deref().unwrap_or_default();
            let _ = write!(text, "# {path}\n{}", String::from_utf8_lossy(settings));
        }
    }
}

/// One table. A rule of FORWARD after the first that refuses is marked: its
/// position is the only thing that is wrong.
fn owned_table(head: &str, owned: &OwnedTable, refused_at: Option<u32>, text: &mut String) {
    if owned.is_empty() {
        return;
    }
    let chains = owned.chains.keys().map(|name| format!(":{name} - [0:0]"));
    let jumps = owned.jumps.iter();
    let jumps = jumps.map(|lead| {
        let late = lead.chain == "FORWARD" && refused_at.is_some_and(|at| lead.position > at);
        let note = if late {
            "   # after a rule that drops or rejects"
        } else {
            ""
        };
        format!("-A {} {}{note}", lead.chain, lead.rule.shown())
    });
    let in_chain = |(name, chain): (&String, &Chain)| {
        let rules = chain.rules.iter();
        let lines = rules.map(|rule| format!("-A {name} {}", rule.shown()));
        lines.collect::<Vec<_>>()
    };
    let rules = owned.chains.iter().flat_map(in_chain);
    let _ = writeln!(text, "# {head}");
    for line in chains.chain(jumps).chain(rules) {
        let _ = writeln!(text, "{line}");
    }
}
