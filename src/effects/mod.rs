//! What a balancer needs of a host besides rules that run: forwarding, files
//! that are read at the next boot, and that connections to servers that are
//! gone end. As with rules, what there is and what there should be become
//! effects, which are shown, carried out and undone.

pub mod conntrack;
pub mod rules_file;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::diff;
use crate::diff::change::Kind;
use crate::netfilter::rule::{Rule, Target};
use crate::netfilter::ruleset::Ruleset;
use crate::netfilter::shares::Server;
use crate::netfilter::{Family, Protocol, Table};
use crate::plan::Plan;
use crate::request::{Disconnect, Persist, Request};

/// What a host has besides rules that run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostSettings {
    /// Whether it forwards, as far as that is known.
    pub forwarding: BTreeMap<Family, bool>,
    /// The files that matter, by path.
    pub files: BTreeMap<PathBuf, File>,
}

/// A file as it was read.
#[derive(Clone, Debug, PartialEq)]
pub struct File {
    /// Of which family its rules are; `None` where it does not matter, or has
    /// no rules.
    pub family: Option<Family>,
    /// What is in it; `None` where it is not there.
    pub text: Option<Vec<u8>>,
    /// What is owned in it; `None` for a file of settings.
    pub ruleset: Option<Ruleset>,
}

/// One effect besides the rules.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Forwarding is switched.
    Forwarding {
        /// Whose.
        family: Family,
        /// To what.
        on: bool,
    },
    /// A file is written.
    Write {
        /// Where.
        path: PathBuf,
        /// Of which family its rules are.
        family: Option<Family>,
        /// What it says then; `None` is not there.
        text: Option<Vec<u8>>,
    },
    /// The connections to a server are ended.
    Disconnect(RemovedBackend),
}

/// A server that is gone, and whose connections those were.
#[derive(Clone, Debug, PartialEq)]
pub struct RemovedBackend {
    /// Whose.
    pub family: Family,
    /// Of this protocol.
    pub protocol: Protocol,
    /// To this server.
    pub server: Server,
    /// As these rules sent them to the balancer.
    pub entries: Vec<Rule>,
    /// The ports of the same address that are a backend still; `None` is all.
    pub kept: Vec<Option<u16>>,
}

/// A connection that the kernel has on record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConntrackEntry {
    /// Its protocol's number.
    pub protocol: u8,
    /// Who began it.
    pub source: IpAddr,
    /// To which address it was addressed.
    pub destination: IpAddr,
    /// And to which port.
    pub port: u16,
    /// Who answers.
    pub answers: (IpAddr, u16),
}

impl Effect {
    /// Its kind, without what it works on.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Forwarding { .. } => Kind::SetSysctl,
            Self::Write { .. } => Kind::WriteFile,
            Self::Disconnect(_) => Kind::DeleteConnections,
        }
    }

    /// Whose it is, where that is one family's.
    #[must_use]
    pub fn family(&self) -> Option<Family> {
        match self {
            Self::Forwarding { family, .. } => Some(*family),
            Self::Write { family, .. } => *family,
            Self::Disconnect(gone) => Some(gone.family),
        }
    }

    /// What is there then, or gone: `net.ipv4.ip_forward = 1`, a path, or
    /// connections as `conntrack` spells them.
    #[must_use]
    pub fn shown(&self) -> String {
        match self {
            Self::Forwarding { family, on } => format!("{} = {}", setting(*family), u8::from(*on)),
            Self::Write { path, .. } => path.display().to_string(),
            Self::Disconnect(gone) => gone.shown(),
        }
    }

    /// What was there before a setting was changed.
    #[must_use]
    pub fn before(&self) -> Option<String> {
        match self {
            Self::Forwarding { family, on } => {
                Some(format!("{} = {}", setting(*family), u8::from(!*on)))
            }
            Self::Write { .. } | Self::Disconnect(_) => None,
        }
    }
}

/// The setting that switches a family's forwarding.
#[must_use]
pub fn setting(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "net.ipv4.ip_forward",
        Family::Ipv6 => "net.ipv6.conf.all.forwarding",
    }
}

/// The file that keeps forwarding on after a reboot. It is read after those
/// that begin with a number.
pub const SETTINGS: &str = "/etc/sysctl.d/zz-iptables_balance.conf";

/// Whether forwarding is to be on after a reboot too.
#[must_use]
pub fn keeps_forwarding(request: &Request) -> bool {
    forwards(request) && request.persist != Persist::No
}

/// Whether forwarding is to be on.
fn forwards(request: &Request) -> bool {
    request
        .balancer()
        .is_some_and(|balancer| balancer.gateway.ip_forward)
}

/// The effects that are still needed, but for connections.
#[must_use]
pub fn missing(request: &Request, plan: &Plan, found: &HostSettings) -> Vec<Effect> {
    let off = to_forward(request, plan);
    let off = off.filter(|family| found.forwarding.get(family) != Some(&true));
    let switched = off.map(|family| Effect::Forwarding { family, on: true });
    let written = found
        .files
        .iter()
        .filter_map(|(path, file)| rewritten(plan, path, file));
    switched.chain(written).collect()
}

/// A family that is to be forwarded, and it cannot be told whether it is.
#[must_use]
pub fn unknown_forwarding(request: &Request, plan: &Plan, found: &HostSettings) -> Option<Family> {
    to_forward(request, plan).find(|family| !found.forwarding.contains_key(family))
}

/// The families that are to be forwarded.
fn to_forward(request: &Request, plan: &Plan) -> impl Iterator<Item = Family> {
    let wanted = |family: &Family| forwards(request) && plan.uses(*family);
    Family::BOTH.into_iter().filter(wanted)
}

fn rewritten(plan: &Plan, path: &Path, file: &File) -> Option<Effect> {
    let text = file.text.as_deref().unwrap_or_default();
    let new = match &file.ruleset {
        Some(ruleset) => {
            let changes = diff::to_plan(plan, file.family.unwrap_or(Family::Ipv4), ruleset);
            (!changes.is_empty()).then(|| rules_file::edited(text, &changes))
        }
        None => {
            let used = Family::BOTH.into_iter().filter(|family| plan.uses(*family));
            with_settings(text, used.map(setting))
        }
    };
    Some(Effect::Write {
        path: path.to_owned(),
        family: file.family,
        text: Some(new?),
    })
}

/// The text in which these settings are 1; `None` where they are already. The
/// last line of a setting is the one that counts.
fn with_settings<'a>(text: &[u8], settings: impl Iterator<Item = &'a str>) -> Option<Vec<u8>> {
    let lines = String::from_utf8_lossy(text).into_owned();
    let is_set = |setting: &str| {
        let tables = lines.lines().filter_map(|line| line.split_once('='));
        let mut values = tables
            .filter(|(name, _)| name.trim() == setting)
            .map(|(_, value)| value.trim());
        values.next_back() == Some("1")
    };
    let unset: String = settings
        .filter(|setting| !is_set(setting))
        .map(|setting| format!("{setting} = 1\n"))
        .collect();
    if unset.is_empty() {
        return None;
    }
    let mut new = text.to_vec();
    if new.is_empty() {
        new.extend(b"# So that this host forwards what iptables_balance balances.\n");
    } else if !new.ends_with(b"\n") {
        new.push(b'\n');
    }
    new.extend(unset.into_bytes());
    Some(new)
}

/// What there is after the effects.
#[must_use]
pub fn applied(effects: &[Effect], found: &HostSettings, request: &Request) -> HostSettings {
    let mut after = found.clone();
    for effect in effects {
        match effect {
            Effect::Forwarding { family, on } => {
                after.forwarding.insert(*family, *on);
            }
            Effect::Write { path, text, .. } => {
                if let Some(file) = after.files.get_mut(path) {
                    let read = |text: &[u8]| Ruleset::read(text, &request.name).ok();
                    file.ruleset = file
                        .ruleset
                        .take()
                        .and_then(|_| read(text.as_deref().unwrap_or_default()));
                    file.text.clone_from(text);
                }
            }
            Effect::Disconnect(_) => {}
        }
    }
    after
}

/// The effects that lead back to what was there.
#[must_use]
pub fn back(before: &HostSettings, now: &HostSettings) -> Vec<Effect> {
    let forwarding = before
        .forwarding
        .iter()
        .filter(|(family, on)| now.forwarding.get(family) != Some(on));
    let switched = forwarding.map(|(family, on)| Effect::Forwarding {
        family: *family,
        on: *on,
    });
    let text_now = |path: &PathBuf| now.files.get(path).and_then(|file| file.text.as_ref());
    let files = before
        .files
        .iter()
        .filter(|(path, file)| text_now(path) != file.text.as_ref());
    let written = files.map(|(path, file)| Effect::Write {
        path: path.clone(),
        family: file.family,
        text: file.text.clone(),
    });
    switched.chain(written).collect()
}

/// The servers that had connections of this balancer by the rules that were
/// there, are not planned, and whose connections are to be ended.
#[must_use]
pub fn gone(
    request: &Request,
    plan: &Plan,
    family: Family,
    before: &Ruleset,
) -> Vec<RemovedBackend> {
    let nat = before.owned(Table::Nat);
    let entries = nat.jumps.iter();
    let entries = entries.filter(|lead| ["PREROUTING", "OUTPUT"].contains(&lead.chain.as_str()));
    let entries: Vec<Rule> = entries
        .filter_map(|lead| lead.rule.meaning.clone())
        .collect();
    let protocols: BTreeSet<_> = entries.iter().map(|rule| rule.protocol).collect();
    // A rule that does not say is of the protocol that comes in.
    let only = protocols
        .first()
        .copied()
        .flatten()
        .filter(|_| protocols.len() == 1);
    let ends = |protocol: Protocol| match request.disconnect {
        Disconnect::Never => false,
        Disconnect::Udp => protocol == Protocol::Udp,
        Disconnect::Always => true,
    };
    let rules = nat.chains.values().flat_map(|chain| &chain.rules);
    let were = rules.filter_map(|rule| server(rule.meaning.as_ref()?, only));
    let were: BTreeSet<_> = were.filter(|(protocol, _)| ends(*protocol)).collect();
    if were.is_empty() {
        return Vec::new();
    }
    let planned = plan.tables.get(&(family, Table::Nat));
    let planned = planned
        .into_iter()
        .flat_map(|part| part.chains.values().flatten());
    let planned: BTreeSet<_> = planned.filter_map(|rule| server(rule, None)).collect();
    let kept = |protocol: Protocol, address: IpAddr| {
        let same = planned
            .iter()
            .filter(move |(of, (at, _))| *of == protocol && *at == address);
        same.map(|(_, (_, port))| *port).collect()
    };
    were.difference(&planned)
        .map(|(protocol, server)| RemovedBackend {
            family,
            protocol: *protocol,
            server: *server,
            entries: entries.clone(),
            kept: kept(*protocol, server.0),
        })
        .collect()
}

/// Where a rule sends the connections of which protocol.
fn server(rule: &Rule, otherwise: Option<Protocol>) -> Option<(Protocol, Server)> {
    match rule.target {
        Target::Dnat { address, port } => Some((rule.protocol.or(otherwise)?, (address, port))),
        _ => None,
    }
}

impl RemovedBackend {
    /// Whether a connection was one of these.
    #[must_use]
    pub fn had(&self, connection: &ConntrackEntry) -> bool {
        let (address, port) = self.server;
        let answers = connection.answers;
        let is_entry = |rule: &Rule| {
            let Some(matches) = &rule.matches else {
                return true;
            };
            let within = |network: Option<ipnet::IpNet>, address: &IpAddr| {
                network.is_none_or(|network| network.contains(address))
            };
            within(matches.source, &connection.source)
                && within(matches.destination, &connection.destination)
                && matches.destination_ports.include(connection.port)
        };
        self.protocol.number().parse() == Ok(connection.protocol)
            && answers.0 == address
            && port.is_none_or(|port| port == answers.1)
            && !self
                .kept
                .iter()
                .any(|kept| kept.is_none_or(|port| port == answers.1))
            && self.entries.iter().any(is_entry)
    }

    /// As `conntrack` spells it: `-p udp --reply-src ADDRESS --reply-port-src PORT`
    #[must_use]
    pub fn shown(&self) -> String {
        let (address, port) = self.server;
        let port = port.map_or_else(String::new, |port| format!(" --reply-port-src {port}"));
        format!("-p {} --reply-src {address}{port}", self.protocol.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_added_once_and_the_last_line_counts() {
        let set = |text: &str| {
            with_settings(text.as_bytes(), ["a.b", "c.d"].into_iter())
                .map(|text| String::from_utf8(text).unwrap())
        };
        let new = set("").unwrap();
        assert!(new.ends_with("\na.b = 1\nc.d = 1\n"), "{new}");
        assert_eq!(set(&new), None);
        assert_eq!(set("a.b=1\nc.d =1"), None);
        assert_eq!(set("a.b=1\nc.d=0").unwrap(), "a.b=1\nc.d=0\nc.d = 1\n");
    }
}
