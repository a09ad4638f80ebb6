//! What the user should know besides what was done.

use crate::converge::outcome::{HostState, RunMode, Steps};
use crate::diff::change::{Action, Change};
use crate::effects::setting;
use crate::host::Host;
use crate::netfilter::{Family, Table};
use crate::preflight::{Facts, not_forwarding};
use crate::request::Request;

/// All warnings, in order.
#[must_use]
pub fn all(
    host: &impl Host,
    request: &Request,
    facts: &Facts,
    found: &HostState,
    steps: &Steps,
    run: RunMode,
) -> Vec<String> {
    let by_hand = steps
        .changes
        .iter()
        .filter_map(|change| by_hand(change, run));
    mixed(host)
        .into_iter()
        .chain(unreadable(found))
        .chain(forwarding(request, facts, found, steps))
        .chain(by_hand)
        .collect()
}

fn mixed(host: &impl Host) -> Option<String> {
    let other = host.variant().other().as_str();
    host.other_variant_in_use().then(|| {
        format!(
            "there are rules of iptables-{other} too; both variants act on every packet, one after the other, \
             and a balancer made there is only found with `variant: {other}`"
        )
    })
}

fn unreadable(found: &HostState) -> Vec<String> {
    let in_family = |(family, tables): (&Family, &Vec<String>)| {
        let title = family.title();
        let worded = |table: &String| {
            format!(
                "{title} table `{table}` was made by `nft` in a way that iptables cannot show; it was left alone"
            )
        };
        tables.iter().map(worded).collect::<Vec<_>>()
    };
    let tables = found
        .rules
        .iter()
        .map(|(family, ruleset)| (family, &ruleset.unreadable));
    tables.flat_map(in_family).collect()
}

/// That nothing is forwarded, or that it still is when the balancer has gone.
fn forwarding(request: &Request, facts: &Facts, found: &HostState, steps: &Steps) -> Vec<String> {
    let known = &found.settings.forwarding;
    let Some(balancer) = request.balancer() else {
        let left_on = |family: &Family| {
            let is_on = known.get(family) == Some(&true);
            is_on && steps.changes.iter().any(|change| change.family == *family)
        };
        let families = Family::BOTH.into_iter().filter(left_on);
        return families
            .map(|family| {
                let (title, setting) = (family.title(), setting(family));
                format!("{title} forwarding was left on ({setting} = 1), since others may need it")
            })
            .collect();
    };
    if balancer.gateway.ip_forward {
        return Vec::new();
    }
    let off = not_forwarding(balancer, facts, known);
    off.into_iter()
        .map(|family| {
            let (title, setting) = (family.title(), setting(family));
            format!(
                "{title} forwarding is off ({setting} = 0), so nothing reaches a backend on another host; \
                 `ip_forward: true` switches it on"
            )
        })
        .collect()
}

/// A rule that jumps to us from where we never put one, or in words that are
/// not ours.
fn by_hand(change: &Change, run: RunMode) -> Option<String> {
    let Action::DeleteFirst(rule) = &change.action else {
        return None;
    };
    let ours: &[&str] = match change.table {
        Table::Nat => &["PREROUTING", "OUTPUT", "POSTROUTING"],
        Table::Filter => &["INPUT", "FORWARD", "OUTPUT"],
        _ => &[],
    };
    if ours.contains(&&*change.chain) && rule.meaning.is_some() {
        return None;
    }
    let gone = match run {
        RunMode::Apply => "was removed",
        RunMode::Check => "would be removed",
    };
    Some(format!(
        "`-A {} {}` in {} table `{}` leads into the balancer's chain and is none of those asked for, so it {gone}; \
         say with `destination_port`, `destination`, `source` and `in_interface` what is balanced",
        change.chain,
        rule.shown(),
        change.family.title(),
        change.table.as_str()
    ))
}
