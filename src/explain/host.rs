//! The rules of this host, and the facts that mistakes depend on.

use anyhow::Result;

use super::{HostFacts, WholeTable, addresses, read};
use crate::host::{Host, Questions, System};
use crate::netfilter::{Family, Variant};

/// Reads the rules of both families, with counters.
///
/// # Errors
/// When there is no iptables, or its dump is broken.
pub fn this_host(variant: Option<Variant>) -> Result<(Vec<WholeTable>, HostFacts)> {
    const WAIT: u32 = 10;
    let host = System::open(variant, WAIT)?;
    let mut tables = Vec::new();
    for family in Family::BOTH {
        tables.extend(read(&host.begin_save(family)?.finish()?, Some(family))?);
    }
    let questions = Questions {
        addresses: addresses(&tables),
        ..Questions::default()
    };
    let known = |family| Some((family, host.forwarding(family)?));
    let facts = HostFacts {
        forwarding: Family::BOTH.into_iter().filter_map(known).collect(),
        own: host.facts(&questions).own,
        is_live: true,
    };
    Ok((tables, facts))
}
