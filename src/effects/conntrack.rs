//! Ending the connections to servers that are gone, when all else is done and
//! found right.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::Result;

use crate::diff::change::Change;
use crate::effects::{ConntrackEntry, Effect, RemovedBackend, gone};
use crate::host::Host;
use crate::netfilter::Family;
use crate::netfilter::ruleset::Ruleset;
use crate::plan::Plan;
use crate::request::Request;

/// The servers whose connections are to be ended.
#[derive(Debug, Default)]
pub struct Disconnects {
    gone: BTreeMap<Family, Vec<RemovedBackend>>,
    /// Those that have some, by family and place.
    now: BTreeMap<Family, BTreeSet<usize>>,
    /// Why connections cannot be ended here.
    pub warning: Option<String>,
}

/// Looks who is gone by these changes, and still has connections.
#[must_use]
pub fn foreseen(
    host: &impl Host,
    request: &Request,
    plan: &Plan,
    before: &BTreeMap<Family, Arc<Ruleset>>,
    changes: &[Change],
) -> Disconnects {
    let mut ending = Disconnects::default();
    for (family, before) in before {
        if !changes.iter().any(|change| change.family == *family) {
            continue;
        }
        let gone = gone(request, plan, *family, before);
        if gone.iter().any(|gone| gone.entries.is_empty()) {
            let problem = "servers are gone, and no rule tells any more which connections to them were the balancer's";
            ending.warning = Some(format!("{problem}; none was ended"));
            continue;
        }
        match found(host, *family, &gone) {
            Ok((now, _)) => {
                ending.now.insert(*family, now);
                ending.gone.insert(*family, gone);
            }
            Err(error) => {
                let problem = "connections to servers that are gone cannot be ended here";
                let way_out = "end them with `conntrack -D`, or say `disconnect: never`";
                ending.warning = Some(format!("{problem}: {error:#}; {way_out}"));
            }
        }
    }
    ending
}

impl Disconnects {
    /// What will be done, as far as can be told beforehand.
    #[must_use]
    pub fn effects(&self) -> Vec<Effect> {
        let in_family = |(family, places): (&Family, &BTreeSet<usize>)| {
            let gone = &self.gone[family];
            places
                .iter()
                .map(|at| Effect::Disconnect(gone[*at].clone()))
                .collect::<Vec<_>>()
        };
        self.now.iter().flat_map(in_family).collect()
    }

    /// Ends what there is by now. Returns whose connections those were.
    ///
    /// # Errors
    /// When the kernel does not let us.
    pub fn carry_out(&self, host: &impl Host) -> Result<Vec<Effect>> {
        let mut ended = Vec::new();
        for (family, gone) in &self.gone {
            let (places, connections) = found(host, *family, gone)?;
            host.end(*family, &connections)?;
            ended.extend(
                places
                    .into_iter()
                    .map(|at| Effect::Disconnect(gone[at].clone())),
            );
        }
        Ok(ended)
    }
}

/// Who has connections, and which.
fn found(
    host: &impl Host,
    family: Family,
    gone: &[RemovedBackend],
) -> Result<(BTreeSet<usize>, Vec<Vec<u8>>)> {
    if gone.is_empty() {
        return Ok(Default::default());
    }
    let mut by_address: HashMap<IpAddr, Vec<usize>> = HashMap::new();
    for (at, gone) in gone.iter().enumerate() {
        by_address.entry(gone.server.0).or_default().push(at);
    }
    let places = RefCell::new(BTreeSet::new());
    let wanted = |connection: &ConntrackEntry| {
        let candidates = by_address.get(&connection.answers.0).into_iter().flatten();
        let had: Vec<usize> = candidates
            .copied()
            .filter(|at| gone[*at].had(connection))
            .collect();
        places.borrow_mut().extend(&had);
        !had.is_empty()
    };
    let connections = host.connections(family, &wanted)?;
    Ok((places.into_inner(), connections))
}
