//! A rule as text, in the order and spelling of `iptables-save`.

use std::fmt;

use super::{Connection, ConnectionState, Matches, Rule, Target};
use crate::netfilter::statistic::Statistic;
use crate::netfilter::{Protocol, shortest};

/// The text after `-A CHAIN`. It begins with a blank.
impl fmt::Display for Rule {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(matches) = &self.matches {
            matches.addresses(out)?;
        }
        if let Some(protocol) = self.protocol {
            out.write_str(" -p ")?;
            out.write_str(protocol.argument())?;
            if let Some(matches) = &self.matches {
                matches.ports(protocol, out)?;
            }
        }
        if let Some(matches) = &self.matches {
            matches.rest(out)?;
        }
        self.statistic.fmt(out)?;
        for hash in &self.hashes {
            write!(out, " -m bpf --bytecode \"{hash}\"")?;
        }
        self.target.fmt(out)
    }
}

impl Matches {
    /// The part before the protocol.
    fn addresses(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(network) = self.source {
            write!(out, " -s {network}")?;
        }
        if let Some(network) = self.destination {
            write!(out, " -d {network}")?;
        }
        if let Some(network) = self.not_destination {
            write!(out, " ! -d {network}")?;
        }
        if let Some(name) = &self.in_interface {
            write!(out, " -i {name}")?;
        }
        if let Some(name) = &self.not_in_interface {
            write!(out, " ! -i {name}")?;
        }
        match &self.out_interface {
            Some(name) => write!(out, " -o {name}"),
            None => Ok(()),
        }
    }

    fn ports(&self, protocol: Protocol, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.destination_ports.ranges() {
            [] => Ok(()),
            [range] => write!(out, " -m {} --dport {range}", protocol.as_str()),
            ranges => {
                let list: Vec<String> = ranges.iter().map(ToString::to_string).collect();
                write!(out, " -m multiport --dports {}", list.join(","))
            }
        }
    }

    /// The part after the ports.
    fn rest(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.to_local {
            out.write_str(" -m addrtype --dst-type LOCAL")?;
        }
        match self.connection == Connection::default() {
            true => Ok(()),
            false => write!(out, " -m conntrack{}", self.connection),
        }
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.state {
            None => Ok(()),
            Some(ConnectionState::Translated) => out.write_str(" --ctstate DNAT"),
            Some(ConnectionState::Established) => write!(out, " --ctstate {ESTABLISHED}"),
            Some(ConnectionState::Untouched) => write!(out, " ! --ctstate {UNTOUCHED}"),
        }?;
        if let Some(protocol) = self.protocol {
            write!(out, " --ctproto {}", protocol.number())?;
        }
        if let Some(network) = self.original_source {
            write!(out, " --ctorigsrc {}", shortest(&network))?;
        }
        if let Some(network) = self.original_destination {
            write!(out, " --ctorigdst {}", shortest(&network))?;
        }
        if let Some(network) = self.reply_source {
            write!(out, " --ctreplsrc {}", shortest(&network))?;
        }
        if let Some(range) = self.original_port {
            write!(out, " --ctorigdstport {range}")?;
        }
        Ok(())
    }
}

/// The states of [`ConnectionState::Established`].
pub(super) const ESTABLISHED: &str = "RELATED,ESTABLISHED";

/// The states that a connection is not in when it is
/// [`ConnectionState::Untouched`], in the order in which iptables saves them.
pub(super) const UNTOUCHED: &str = "INVALID,RELATED,ESTABLISHED,UNTRACKED,DNAT";

impl fmt::Display for Statistic {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Always => Ok(()),
            Self::Nth { every, packet } => {
                write!(
                    out,
                    " -m statistic --mode nth --every {every} --packet {packet}"
                )
            }
            Self::Random(chance) => {
                write!(out, " -m statistic --mode random --probability {chance}")
            }
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dnat(endpoint) => write!(out, " -j DNAT --to-destination {endpoint}"),
            Self::Accept => out.write_str(" -j ACCEPT"),
            Self::Drop => out.write_str(" -j DROP"),
            Self::Reject(with) => write!(out, " -j REJECT --reject-with {}", with.as_str()),
            Self::Masquerade => out.write_str(" -j MASQUERADE"),
            Self::Snat(address) => write!(out, " -j SNAT --to-source {address}"),
            Self::Jump(chain) => write!(out, " -j {chain}"),
            Self::Goto(chain) => write!(out, " -g {chain}"),
        }
    }
}
