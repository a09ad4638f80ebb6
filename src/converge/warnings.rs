//! Warnings about the observed state and about the steps.

use std::path::PathBuf;

use super::outcome::{HostState, Outcome, RunMode, Steps};
use super::retry::Attempt;
use crate::diff::change::{Action, Change};
use crate::host::{Facts, Host, Questions, forwarding_sysctl};
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::{Family, Table};
use crate::preflight::{grouped, not_forwarding, untracked};
use crate::request::{Persist, Request};

/// The circumstances of a run.
pub(super) struct Context<'a, H> {
    pub host: &'a H,
    pub request: &'a Request,
    pub facts: &'a Facts,
    pub mode: RunMode,
}

impl<H> Clone for Context<'_, H> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<H> Copy for Context<'_, H> {}

/// The warnings that are known before anything is written.
pub(super) fn before(context: Context<impl Host>, attempt: &Attempt) -> Vec<String> {
    let Context {
        host,
        request,
        facts,
        mode,
    } = context;
    let changes = attempt.steps.changes.iter();
    mixed(host)
        .into_iter()
        .chain(unreadable(&attempt.before))
        .chain(forwarding(request, facts, &attempt.before, &attempt.steps))
        .chain(changes.filter_map(|change| by_hand(change, mode)))
        .chain(still_at_boot(host, request))
        .collect()
}

/// The warning that is known only after the rules were written: the first rule
/// in the nat table can make the kernel start to track connections.
pub(super) fn after(context: Context<impl Host>, outcome: &Outcome) -> Vec<String> {
    let has_written = context.mode == RunMode::Apply && !outcome.steps.is_empty();
    let balancers = context.request.balancers();
    if !has_written || balancers.is_empty() {
        return Vec::new();
    }
    let known = &context.facts.untracked;
    let protocols = balancers.iter().map(|balancer| balancer.protocol);
    let protocols = protocols.filter(|protocol| !known.contains(protocol));
    let facts = context.host.facts(&Questions::of_tracking(protocols));
    let warnings = balancers.iter();
    grouped(warnings.filter_map(|balancer| Some((balancer, untracked(balancer, &facts)?))))
}

/// The most programs of BPF that are thought safe. The kernel frees them one by one in
/// work items of one processor, of which 1,024 run at a time; Linux 6.18 was seen to
/// hang for ever when tens of thousands were freed at once.
const PROGRAMS_MAX: usize = 1000;

/// The warning of a change with which, before or after it, there are so many programs
/// of BPF that freeing them may stop the kernel.
pub(super) fn many_programs(outcome: &Outcome) -> Option<String> {
    if outcome.steps.changes.is_empty() {
        return None;
    }
    let programs = |state: &HostState| -> usize {
        let tables = state
            .rules
            .values()
            .flat_map(|ruleset| ruleset.tables.values());
        let rules = tables.flat_map(|table| table.chains.values().flat_map(|chain| &chain.rules));
        let meanings = rules.filter_map(|rule| rule.meaning.as_ref());
        meanings.map(|rule| rule.hashes.len()).sum()
    };
    let most = programs(&outcome.before).max(programs(&outcome.after));
    (most > PROGRAMS_MAX).then(|| {
        format!(
            "`mode: hash` has {most} programs of BPF here; a kernel was seen to hang when tens of thousands were freed at once, \
             as a removal does, and with iptables-legacy each change; keep to {PROGRAMS_MAX} backends, remove them some hundreds at a time, \
             or take `mode: random`"
        )
    })
}

/// The files that are loaded at boot and have rules of a balancer that the
/// request does not persist.
fn still_at_boot(host: &impl Host, request: &Request) -> Vec<String> {
    if request.persist != Persist::No {
        return Vec::new();
    }
    let files = host.boot_files().unwrap_or_default();
    let has_rules = |path: &&PathBuf| {
        let text = host.load(path).ok().flatten().unwrap_or_default();
        Ruleset::read(&text, &request.name).is_ok_and(|ruleset| !ruleset.is_empty())
    };
    let found = files.values().filter(has_rules);
    found
        .map(|path| {
            format!(
                "`{}` has something of the balancer too, and is loaded at boot; `persist: true` looks after it",
                path.display()
            )
        })
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

/// Forwarding that is off although a backend is on another host, or that stays on
/// after the balancer was removed.
fn forwarding(request: &Request, facts: &Facts, found: &HostState, steps: &Steps) -> Vec<String> {
    let known = &found.settings.forwarding;
    if request.balancers().is_empty() {
        let left_on = |family: &Family| {
            let is_on = known.get(family) == Some(&true);
            is_on && steps.changes.iter().any(|change| change.family == *family)
        };
        let families = Family::BOTH.into_iter().filter(left_on);
        return families
            .map(|family| {
                let (title, setting) = (family.title(), forwarding_sysctl(family));
                format!("{title} forwarding was left on ({setting} = 1), since others may need it")
            })
            .collect();
    }
    let balancers = request.balancers().iter();
    let needing = balancers.filter(|balancer| !balancer.gateway.ip_forward);
    grouped(needing.flat_map(|balancer| {
        let off = not_forwarding(balancer, facts, known).into_iter();
        off.map(move |family| {
            let (title, setting) = (family.title(), forwarding_sysctl(family));
            let warning = format!(
                "{title} forwarding is off ({setting} = 0), so nothing reaches a backend on another host; \
                 `ip_forward: true` switches it on"
            );
            (balancer, warning)
        })
    }))
}

/// A jump rule that is removed and was made by hand: it stands in a chain in which
/// this program never puts one, or has matches that it never writes.
fn by_hand(change: &Change, run: RunMode) -> Option<String> {
    let (Action::DeleteFirst(rule) | Action::DeleteJump(rule)) = &change.action else {
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
