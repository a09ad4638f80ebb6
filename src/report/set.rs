//! The words about a set: what changed in which balancer.

use std::collections::{BTreeMap, BTreeSet};

use super::{ReportedBalancer, backends};
use crate::converge::outcome::Steps;
use crate::diff::change::{Action, Change};
use crate::effects::Effect;
use crate::netfilter::Name;
use crate::netfilter::rule::Target;
use crate::netfilter::ruleset::SavedRule;
use crate::request::{Balancer, Request, listed};

/// The balancers of a set, in the order of the request.
pub(super) fn balancers(request: &Request, steps: &Steps) -> Option<Vec<ReportedBalancer>> {
    if !request.is_set() {
        return None;
    }
    let changed = changed_balancers(&request.name, steps);
    let named = request
        .balancers()
        .iter()
        .filter_map(|one| one.name.as_ref());
    let reported = named.map(|name| ReportedBalancer {
        name: name.clone(),
        changed: changed.contains_key(name.as_str()),
    });
    Some(reported.collect())
}

/// The balancers that changes are about, each with their number. The rules of the
/// set that lead to a balancer are its own.
pub(super) fn changed_balancers<'a>(name: &Name, steps: &'a Steps) -> BTreeMap<&'a str, usize> {
    let mut changed = BTreeMap::new();
    let mut add = |balancer: &'a str| *changed.entry(balancer).or_insert(0) += 1;
    for change in &steps.changes {
        match name.member(&change.chain) {
            Some(balancer) => add(balancer),
            None => {
                let rules = [change.action.before(), change.action.rule()];
                let targets = rules.into_iter().flatten().filter_map(target);
                let about: BTreeSet<&str> =
                    targets.filter_map(|chain| name.member(chain)).collect();
                about.into_iter().for_each(&mut add);
            }
        }
    }
    for effect in &steps.effects {
        if let Effect::Disconnect(removed) = effect {
            removed.balancer.as_deref().into_iter().for_each(&mut add);
        }
    }
    changed
}

fn target(rule: &SavedRule) -> Option<&str> {
    match &rule.meaning.as_ref()?.target {
        Target::Goto(chain) | Target::Jump(chain) => Some(chain),
        _ => None,
    }
}

/// `500 balancers over 5000 backends`
pub(super) fn size(balancers: &[Balancer]) -> String {
    let pools = balancers.iter().flat_map(|balancer| &balancer.pools);
    let backends = backends(pools.map(|pool| pool.backends.len()).sum());
    match balancers.len() {
        0 => "no balancer".to_owned(),
        1 => format!("1 balancer over {backends}"),
        count => format!("{count} balancers over {backends}"),
    }
}

/// The balancers that were added, changed and removed, in words. None of a set that
/// is new as a whole.
pub(super) fn told(request: &Request, steps: &Steps, existed: bool) -> String {
    if !existed {
        return String::new();
    }
    let name = &request.name;
    let listed_now: BTreeSet<&str> = request
        .balancers()
        .iter()
        .filter_map(|balancer| balancer.name.as_deref())
        .collect();
    let is_new = |change: &&Change| {
        let chain = change.chain.strip_prefix(name.as_str());
        let main = chain.and_then(|rest| rest.strip_prefix('/'));
        change.action == Action::CreateChain && main.is_some_and(|main| !main.contains('/'))
    };
    let new: BTreeSet<&str> = steps
        .changes
        .iter()
        .filter(is_new)
        .filter_map(|change| name.member(&change.chain))
        .collect();
    let (mut added, mut changed, mut removed) = (Vec::new(), Vec::new(), Vec::new());
    for balancer in changed_balancers(name, steps).into_keys() {
        match (listed_now.contains(balancer), new.contains(balancer)) {
            (false, _) => removed.push(balancer),
            (true, true) => added.push(balancer),
            (true, false) => changed.push(balancer),
        }
    }
    let all = [("added", added), ("changed", changed), ("removed", removed)];
    let all = all.into_iter().filter(|(_, names)| !names.is_empty());
    let told: Vec<String> = all
        .map(|(verb, names)| format!("{verb} {}", listed(names.into_iter())))
        .collect();
    match told.is_empty() {
        true => String::new(),
        false => format!(": {}", told.join(", ")),
    }
}
