//! The outcome of a run in the terms of the contract. Ansible and plain JSON
//! send it as it is, and parts of it may be in the words of JSON in advance; the
//! other front ends word it themselves.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::Path;
use std::sync::OnceLock;

use schemars::JsonSchema;
use serde::{Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};

use crate::converge::outcome::{HostState, Outcome, RunMode, Steps};
use crate::diff::change::{Change, Kind};
use crate::effects::{Effect, File, setting};
use crate::host::Variant;
use crate::netfilter::ruleset::{Chain, OwnedTable, SavedRule};
use crate::netfilter::shares::shares_of_chain;
use crate::netfilter::statistic::Share;
use crate::netfilter::{Family, Table};
use crate::request::{
    Backend, Balancer, Desired, DesiredState, Name, Pool, Request, UncheckedRequest,
};

/// What a run found and did.
#[derive(Debug, Default, Serialize, JsonSchema)]
#[schemars(title = "iptables_balance result")]
pub struct Report {
    /// Whether something was changed, or would be in check mode.
    pub changed: bool,
    /// Whether what was asked for is not there.
    pub failed: bool,
    /// What happened, in one sentence.
    pub msg: String,
    /// What the user should know besides.
    pub warnings: Vec<String>,
    /// The balancer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The state that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<DesiredState>,
    /// Which iptables was worked on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<Variant>,
    /// Its version, such as `1.8.9`; left out where its dump names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iptables_version: Option<String>,
    /// What was changed, or would be, in order.
    #[schemars(with = "Vec<ReportedChange<'_>>")]
    pub changes: Worded<Steps>,
    /// What each backend gets by the rules as they stand then.
    #[schemars(with = "Vec<ReportedShare>")]
    pub distribution: Worded<Vec<ReportedShare>>,
    /// What the balancer owned before and owns then, when it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff: Option<Diff>,
    /// What it was made from. To take that apart is a tenth of a run with
    /// thousands of backends, and a waste right before the program ends.
    #[serde(skip)]
    leftovers: Leftovers,
}

/// What is of no use once a report is made.
#[derive(Debug, Default)]
struct Leftovers {
    _outcome: Option<Outcome>,
    asked: Option<(UncheckedRequest, Request)>,
}

/// One step. What does not apply to it is left out.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct ReportedChange<'a> {
    /// Whose rules, forwarding or connections; left out for a file that is no family's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<Family>,
    /// In which table.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<Table>,
    /// What was done.
    pub action: Kind,
    /// To which chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chain: Option<&'a str>,
    /// The rule that is there after the step, or that is gone after it, as `iptables-save` spells it.
    /// With `set_sysctl` the setting and its value, with `write_file` the path, with `delete_connections`
    /// what they have in common, as `conntrack` spells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<Cow<'a, str>>,
    /// The rule whose place was taken, or the setting as it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<Cow<'a, str>>,
}

/// What a backend gets.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct ReportedShare {
    /// The family whose connections it shares in.
    pub family: Family,
    /// Its address.
    pub address: std::net::IpAddr,
    /// Its port; left out where connections keep the one they came in on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Its weight as asked for.
    pub weight: u32,
    /// Its share of its family's new connections, 0 to 1: the double nearest to the exact one.
    pub share: f64,
}

/// A part of the result, perhaps in JSON already: with thousands of backends that
/// takes a while, in which others can work.
#[derive(Clone, Debug, Default)]
pub struct Worded<T> {
    /// What it is.
    pub value: T,
    json: Option<Box<RawValue>>,
}

impl<T: Serialize> Worded<T> {
    /// Words it now.
    #[must_use]
    pub fn now(value: T) -> Self {
        Self {
            json: to_raw_value(&value).ok(),
            value,
        }
    }
}

impl<T> From<T> for Worded<T> {
    fn from(value: T) -> Self {
        Self { value, json: None }
    }
}

impl<T: Serialize> Serialize for Worded<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.json {
            Some(json) => json.serialize(serializer),
            None => self.value.serialize(serializer),
        }
    }
}

/// What is worded before the outcome is known, by whoever has the time.
#[derive(Debug, Default)]
pub struct Beforehand {
    shares: OnceLock<Worded<Vec<ReportedShare>>>,
    steps: OnceLock<Option<Box<RawValue>>>,
}

impl Beforehand {
    /// Words what each backend is to get, if that is not yet done.
    pub fn word_shares(&self, request: &Request) {
        self.shares
            .get_or_init(|| Worded::now(planned_shares(request)));
    }

    /// Words the steps that are to be carried out. Which connections are ended
    /// is only known afterwards.
    pub fn word_steps(&self, steps: &Steps) {
        if !ends_connections(steps) {
            self.steps.get_or_init(|| to_raw_value(steps).ok());
        }
    }
}

fn ends_connections(steps: &Steps) -> bool {
    let mut effects = steps.effects.iter();
    effects.any(|effect| matches!(effect, Effect::Disconnect(_)))
}

impl Serialize for Steps {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.reported())
    }
}

impl Steps {
    /// One by one.
    pub fn reported(&self) -> impl Iterator<Item = ReportedChange<'_>> {
        let changes = self.changes.iter().map(ReportedChange::from);
        changes.chain(self.effects.iter().map(ReportedChange::from))
    }
}

/// What each backend gets if all is as planned, in the order asked for.
fn planned_shares(request: &Request) -> Vec<ReportedShare> {
    shares(request, |pool| pool.arrangement.shares(pool.backends.len()))
}

/// What is read off the rules that are there.
fn found_shares(request: &Request, outcome: &Outcome) -> Vec<ReportedShare> {
    shares(request, |pool| {
        let ruleset = outcome.after.rules.get(&pool.family);
        let owned = ruleset.map(|ruleset| ruleset.owned(Table::Nat));
        let found = owned.map(|owned| shares_of_chain(owned, request.name.as_str()));
        let found = found.unwrap_or_default();
        let of_backend = |backend: &Backend| found.get(&(backend.address, backend.port)).copied();
        let backends = pool.backends.iter();
        backends
            .map(|backend| of_backend(backend).unwrap_or(Share::NONE))
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
            address: backend.address,
            port: backend.port,
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
    /// Nothing was done, because of this.
    #[must_use]
    pub fn failure(reason: impl Into<String>) -> Self {
        Self {
            failed: true,
            msg: reason.into(),
            ..Self::default()
        }
    }

    /// Nothing was done, because of this, with what was asked about.
    #[must_use]
    pub fn unread((name, state): (Name, DesiredState), reason: impl Into<String>) -> Self {
        Self {
            name: Some(name.as_str().to_owned()),
            state: Some(state),
            ..Self::failure(reason)
        }
    }

    /// What came of the request, with before and after if they are wanted. What
    /// was worded beforehand counts only where all went as it was to at the first
    /// attempt.
    #[must_use]
    pub fn new(
        request: &Request,
        mut outcome: Outcome,
        beforehand: Beforehand,
        run: RunMode,
        diff: bool,
    ) -> Self {
        let steps = std::mem::take(&mut outcome.steps);
        let as_foreseen = outcome.failure.is_none();
        let is_as_worded = as_foreseen && outcome.attempts == 1 && !ends_connections(&steps);
        let json = beforehand.steps.into_inner().flatten();
        Self {
            changed: !steps.is_empty(),
            failed: outcome.failure.is_some(),
            msg: match &outcome.failure {
                Some(failure) => failure.clone(),
                None => sentence(request, &outcome, steps.len(), run),
            },
            warnings: outcome.warnings.clone(),
            name: Some(request.name.as_str().to_owned()),
            state: Some(request.state()),
            variant: Some(outcome.variant),
            iptables_version: outcome.version().map(str::to_owned),
            diff: diff.then(|| Diff {
                before: owned_text(&outcome.before, &steps, Moment::Before),
                after: owned_text(&outcome.after, &steps, Moment::After),
                before_header: format!("{} (before)", request.name.as_str()),
                after_header: format!("{} (after)", request.name.as_str()),
            }),
            changes: Worded {
                json: json.filter(|_| is_as_worded),
                value: steps,
            },
            distribution: match (as_foreseen, beforehand.shares.into_inner()) {
                (true, Some(shares)) => shares,
                (true, None) => planned_shares(request).into(),
                (false, _) => found_shares(request, &outcome).into(),
            },
            leftovers: Leftovers {
                _outcome: Some(outcome),
                asked: None,
            },
        }
    }

    /// Takes along what was asked, which is of no use any more either.
    #[must_use]
    pub fn with_asked(mut self, draft: UncheckedRequest, request: Request) -> Self {
        self.leftovers.asked = Some((draft, request));
        self
    }

    /// Writes it as one line of JSON.
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

fn sentence(request: &Request, outcome: &Outcome, changes: usize, run: RunMode) -> String {
    let name = request.name.as_str();
    let counted = match changes {
        0 => String::new(),
        1 => ", with 1 change".to_owned(),
        more => format!(", with {more} changes"),
    };
    let mut rulesets = outcome.before.rules.values();
    let existed = rulesets.any(|found| !found.is_empty());
    match (&request.desired, changes == 0, run) {
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

/// Connections are there before they are ended, and not after.
#[derive(Clone, Copy, PartialEq)]
enum Moment {
    Before,
    After,
}

/// What is owned, as `iptables-save` would show it without the rest and
/// without counters; and all else that is about to be changed.
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
                let _ = writeln!(text, "# sysctl\n{} = {}", setting(*family), u8::from(on));
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

/// What a file has of ours; of settings it is all.
fn file_text(path: &Path, file: &File, text: &mut String) {
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

/// A rule of FORWARD after the first that refuses is in the wrong place, which
/// is all that is wrong with it.
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
