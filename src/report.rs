//! The outcome of a run in the terms of the contract, before any protocol
//! words it. Ansible and plain JSON send it as it is.

use std::fmt::Write as _;
use std::io;

use schemars::JsonSchema;
use serde::Serialize;

use crate::change::{Change, Kind};
use crate::converge::{Outcome, Run, State};
use crate::distribution;
use crate::host::Variant;
use crate::net::{Family, Table};
use crate::request::{Balancer, Request, State as Wish, Wanted};
use crate::ruleset::Owned;

/// What a run found and did.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
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
    pub state: Option<Wish>,
    /// Which iptables was worked on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<Variant>,
    /// Its version, such as `1.8.9`; left out where its dump names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iptables_version: Option<String>,
    /// What was changed, or would be, in order.
    pub changes: Vec<ReportedChange>,
    /// What each backend gets by the rules as they stand then.
    pub distribution: Vec<ReportedShare>,
    /// What the balancer owned before and owns then, when it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff: Option<Diff>,
}

/// One step. What does not apply to it is left out.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct ReportedChange {
    /// Whose rules.
    pub family: Family,
    /// In which table.
    pub table: Table,
    /// What was done.
    pub action: Kind,
    /// To which chain.
    pub chain: String,
    /// The rule that is there after the step, or that is gone after it, as `iptables-save` spells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// The rule whose place was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
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

    /// The request was understood, but the host could not be read.
    #[must_use]
    pub fn unread(request: &Request, reason: impl Into<String>) -> Self {
        Self {
            name: Some(request.name.as_str().to_owned()),
            state: Some(wish(request)),
            ..Self::failure(reason)
        }
    }

    /// What came of the request, with before and after if they are wanted.
    #[must_use]
    pub fn new(request: &Request, outcome: &Outcome, run: Run, diff: bool) -> Self {
        let changes: Vec<_> = outcome.changes.iter().map(ReportedChange::from).collect();
        let msg = match &outcome.failure {
            Some(failure) => failure.clone(),
            None => sentence(request, outcome, run),
        };
        Self {
            changed: !changes.is_empty(),
            failed: outcome.failure.is_some(),
            msg,
            warnings: outcome.warnings.clone(),
            variant: Some(outcome.variant),
            iptables_version: outcome.version().map(str::to_owned),
            changes,
            distribution: match &request.wanted {
                Wanted::Present(balancer) => shares(request, balancer, &outcome.after),
                Wanted::Absent => Vec::new(),
            },
            diff: diff.then(|| Diff {
                before: owned_text(&outcome.before),
                after: owned_text(&outcome.after),
                before_header: format!("{} (before)", request.name.as_str()),
                after_header: format!("{} (after)", request.name.as_str()),
            }),
            ..Self::unread(request, "")
        }
    }

    /// Writes it as one line of JSON.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_json(&self, out: &mut impl io::Write) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        out.write_all(&line)?;
        out.flush()
    }
}

impl From<&Change> for ReportedChange {
    fn from(change: &Change) -> Self {
        Self {
            family: change.family,
            table: change.table,
            action: change.action.kind(),
            chain: change.chain.clone(),
            rule: change.action.rule().map(crate::ruleset::SavedRule::shown),
            before: change.action.before().map(crate::ruleset::SavedRule::shown),
        }
    }
}

fn wish(request: &Request) -> Wish {
    match request.wanted {
        Wanted::Absent => Wish::Absent,
        Wanted::Present(_) => Wish::Present,
    }
}

fn sentence(request: &Request, outcome: &Outcome, run: Run) -> String {
    let name = request.name.as_str();
    let counted = match outcome.changes.len() {
        0 => String::new(),
        1 => ", with 1 change".to_owned(),
        more => format!(", with {more} changes"),
    };
    let existed = outcome.before.values().any(|found| !found.is_empty());
    match (&request.wanted, outcome.changes.is_empty(), run) {
        (Wanted::Absent, true, _) => format!("there is no balancer `{name}`"),
        (Wanted::Absent, false, Run::Apply) => format!("removed the balancer `{name}`{counted}"),
        (Wanted::Absent, false, Run::Check) => {
            format!("would remove the balancer `{name}`{counted}")
        }
        (Wanted::Present(balancer), true, _) => {
            format!(
                "the balancer `{name}` is as it should be, over {}",
                pool(balancer)
            )
        }
        (Wanted::Present(balancer), false, Run::Apply) => {
            let done = if existed { "updated" } else { "set up" };
            format!(
                "the balancer `{name}` was {done} over {}{counted}",
                pool(balancer)
            )
        }
        (Wanted::Present(balancer), false, Run::Check) => {
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
        1 => "1 backend".to_owned(),
        more => format!("{more} backends"),
    }
}

fn shares(request: &Request, balancer: &Balancer, after: &State) -> Vec<ReportedShare> {
    let nothing = Owned::default();
    let mut reported = Vec::new();
    for pool in &balancer.pools {
        let family = pool.family;
        let owned = after
            .get(&family)
            .and_then(|ruleset| ruleset.tables.get(&Table::Nat));
        let shares = distribution::shares(owned.unwrap_or(&nothing), request.name.as_str());
        reported.extend(pool.backends.iter().map(|backend| {
            let share = shares.get(&(backend.address, backend.port));
            ReportedShare {
                family,
                address: backend.address,
                port: backend.port,
                weight: backend.weight,
                share: share.map_or(0.0, |share| share.as_f64()),
            }
        }));
    }
    reported
}

/// What is owned, as `iptables-save` would show it without the rest and
/// without counters.
fn owned_text(state: &State) -> String {
    let mut text = String::new();
    for (family, ruleset) in state {
        for (table, owned) in ruleset.tables.iter().filter(|(_, owned)| !owned.is_empty()) {
            let mut lines = vec![format!("# {} {}", family.as_str(), table.as_str())];
            lines.extend(owned.chains.keys().map(|name| format!(":{name} - [0:0]")));
            lines.extend(
                owned
                    .leads
                    .iter()
                    .map(|lead| format!("-A {} {}", lead.chain, lead.rule.shown())),
            );
            for (name, chain) in &owned.chains {
                lines.extend(
                    chain
                        .rules
                        .iter()
                        .map(|rule| format!("-A {name} {}", rule.shown())),
                );
            }
            for line in lines {
                let _ = writeln!(text, "{line}");
            }
        }
    }
    text
}
