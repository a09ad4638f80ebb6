//! Networks in CIDR notation.

use std::net::IpAddr;

use ipnet::IpNet;

/// An address or a network in CIDR notation, without bits beyond its prefix.
#[must_use]
pub fn network(text: &str) -> Option<IpNet> {
    let network = text.parse::<IpNet>().ok();
    let network = network.or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    network.map(|network| network.trunc())
}

/// A network as people write it: a single address without its length.
#[must_use]
pub fn shortest(network: &IpNet) -> String {
    match network.prefix_len() == network.max_prefix_len() {
        true => network.addr().to_string(),
        false => network.to_string(),
    }
}
