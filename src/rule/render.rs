//! A rule as text, in the order and spelling of `iptables-save`.

use std::fmt;
use std::net::IpAddr;

use super::{Rule, Target};
use crate::net::Protocol;
use crate::statistic::Statistic;

/// What stands after `-A CHAIN`: it begins with a blank.
impl fmt::Display for Rule {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(network) = self.source {
            write!(out, " -s {network}")?;
        }
        if let Some(network) = self.destination {
            write!(out, " -d {network}")?;
        }
        if let Some(name) = &self.in_interface {
            write!(out, " -i {name}")?;
        }
        if let Some(protocol) = self.protocol {
            write!(out, " -p {}", protocol.argument())?;
            self.ports(protocol, out)?;
        }
        if self.to_local {
            out.write_str(" -m addrtype --dst-type LOCAL")?;
        }
        write!(out, "{}{}", self.statistic, self.target)
    }
}

impl Rule {
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
}

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
            Self::Dnat { address, port } => {
                out.write_str(" -j DNAT --to-destination ")?;
                match (address, port) {
                    (address, None) => write!(out, "{address}"),
                    (IpAddr::V4(address), Some(port)) => write!(out, "{address}:{port}"),
                    (IpAddr::V6(address), Some(port)) => write!(out, "[{address}]:{port}"),
                }
            }
            Self::Jump(chain) => write!(out, " -j {chain}"),
            Self::Goto(chain) => write!(out, " -g {chain}"),
        }
    }
}
