//! Claims: the traffic of a balancer, and the blocks that chains branch by.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::netfilter::rule::{Matches, Target};
use crate::netfilter::{Family, PortRange, Ports, Protocol, interfaces_meet, networks_meet};

/// Traffic, and the rule that takes it.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The transport protocol.
    pub protocol: Protocol,
    /// The ports that it is addressed to.
    pub ports: Ports,
    /// The network that it comes from.
    pub source: Option<IpNet>,
    /// The network that it is addressed to.
    pub destination: Option<IpNet>,
    /// The matches that no chain branches by.
    pub rest: Matches,
    /// The target of its rule.
    pub target: Target,
    /// True if the target may let traffic pass, which then must not come to a
    /// later claim.
    pub falls_through: bool,
}

impl Claim {
    /// Returns true if a packet can be of both claims.
    pub fn meets(&self, other: &Self) -> bool {
        self.protocol == other.protocol
            && networks_meet(self.destination, other.destination)
            && networks_meet(self.source, other.source)
            && interfaces_meet(
                self.rest.in_interface.as_deref(),
                other.rest.in_interface.as_deref(),
            )
            && self.ports.meet(&other.ports)
    }

    /// The part of a dimension that the claim takes, as ascending ranges.
    pub fn extent(&self, dimension: Dimension, family: Family) -> impl Iterator<Item = Block> {
        let of_network = |network: Option<IpNet>| {
            Some(network.map_or(Block::all(dimension, family), Block::of_network))
        };
        let (ports, network) = match dimension {
            Dimension::Port => (self.ports.all_ranges(), None),
            Dimension::Destination => (&[][..], of_network(self.destination)),
            Dimension::Source => (&[][..], of_network(self.source)),
        };
        let ports = ports.iter().map(|range| Block::of_ports(*range));
        ports.chain(network)
    }
}

/// A property of packets that chains branch by, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dimension {
    /// The port that they are addressed to.
    Port,
    /// The address that they are addressed to.
    Destination,
    /// The address that they come from.
    Source,
}

impl Dimension {
    /// The dimension that a chain branches by where all claims take all of this one.
    pub fn next(self) -> Option<Self> {
        match self {
            Self::Port => Some(Self::Destination),
            Self::Destination => Some(Self::Source),
            Self::Source => None,
        }
    }
}

/// A range of ports or addresses, both ends included. What a chain branches by
/// has a power of four of them, and begins at a multiple of that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    pub first: u128,
    pub last: u128,
}

impl Block {
    pub fn all(dimension: Dimension, family: Family) -> Self {
        let last = match (dimension, family) {
            (Dimension::Port, _) => u16::MAX.into(),
            (_, Family::Ipv4) => u32::MAX.into(),
            (_, Family::Ipv6) => u128::MAX,
        };
        Self { first: 0, last }
    }

    fn of_ports(range: PortRange) -> Self {
        Self {
            first: range.first.into(),
            last: range.last.into(),
        }
    }

    fn of_network(network: IpNet) -> Self {
        Self {
            first: number(network.network()),
            last: number(network.broadcast()),
        }
    }

    pub fn holds(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    pub fn meets(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// The quarters of a block that is more than one value.
    pub fn quarters(self) -> [Self; 4] {
        let quarter = (self.last - self.first) / 4 + 1;
        [0, 1, 2, 3].map(|at| {
            let first = self.first + at * quarter;
            Self {
                first,
                last: first + (quarter - 1),
            }
        })
    }

    /// The smallest block to branch by that holds this range.
    pub fn hull(self) -> Self {
        let mut bits = 0;
        while bits < 128 && self.first >> bits != self.last >> bits {
            bits += 2;
        }
        let low = match bits {
            128 => u128::MAX,
            bits => (1 << bits) - 1,
        };
        Self {
            first: self.first & !low,
            last: self.first | low,
        }
    }

    /// The number of times that a block can be quartered.
    pub fn depth(self) -> u32 {
        (128 - (self.last - self.first).leading_zeros()).div_ceil(2)
    }

    /// The ports of a block of ports.
    pub fn ports(self) -> PortRange {
        let port = |number| u16::try_from(number).unwrap_or(u16::MAX);
        PortRange {
            first: port(self.first),
            last: port(self.last),
        }
    }

    /// The network of a block of addresses; `None` if that is everywhere.
    pub fn network(self, family: Family) -> Option<IpNet> {
        let host_bits = 128 - (self.last - self.first).leading_zeros();
        let (address, bits) = match family {
            Family::Ipv4 => {
                let address = u32::try_from(self.first).unwrap_or(u32::MAX);
                (IpAddr::from(Ipv4Addr::from(address)), 32)
            }
            Family::Ipv6 => (IpAddr::from(Ipv6Addr::from(self.first)), 128),
        };
        let length = u8::try_from(bits - host_bits.min(bits)).unwrap_or(0);
        IpNet::new(address, length).ok().filter(|_| length > 0)
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(first: u128, last: u128) -> Block {
        Block { first, last }
    }

    #[test]
    fn a_hull_is_the_smallest_power_of_four_around_a_range() {
        assert_eq!(block(80, 80).hull(), block(80, 80));
        assert_eq!(block(80, 81).hull(), block(80, 83));
        assert_eq!(block(79, 80).hull(), block(64, 127));
        assert_eq!(block(0, u128::MAX).hull(), block(0, u128::MAX));
        assert_eq!(block(0, 65_535).depth(), 8);
        assert_eq!(block(80, 83).depth(), 1);
        assert_eq!(block(80, 80).depth(), 0);
    }

    #[test]
    fn quarters_make_the_whole() {
        for whole in [block(16, 31), block(0, u128::MAX)] {
            let quarters = whole.quarters();
            assert_eq!(quarters[0].first, whole.first);
            assert_eq!(quarters[3].last, whole.last);
            for pair in quarters.windows(2) {
                assert_eq!(pair[0].last + 1, pair[1].first);
            }
        }
    }

    #[test]
    fn a_block_of_addresses_is_a_network() {
        let network = |text: &str| -> IpNet { text.parse().unwrap() };
        for (text, family) in [
            ("10.0.0.0/8", Family::Ipv4),
            ("192.0.2.1/32", Family::Ipv4),
            ("fd00::/8", Family::Ipv6),
            ("fd00::1/128", Family::Ipv6),
        ] {
            let block = Block::of_network(network(text));
            assert_eq!(block.network(family), Some(network(text)));
        }
        let everywhere = Block::all(Dimension::Source, Family::Ipv6);
        assert_eq!(everywhere.network(Family::Ipv6), None);
    }
}
