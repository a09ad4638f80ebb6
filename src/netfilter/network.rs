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

/// Returns true if an address is in both networks; `None` is everywhere.
#[must_use]
pub fn networks_meet(one: Option<IpNet>, other: Option<IpNet>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => one.contains(&other) || other.contains(&one),
        _ => true,
    }
}

/// Returns true if an interface fits both names, of which each may end with `+`
/// for any ending; `None` is every interface.
#[must_use]
pub fn interfaces_meet(one: Option<&str>, other: Option<&str>) -> bool {
    let (Some(one), Some(other)) = (one, other) else {
        return true;
    };
    match (one.strip_suffix('+'), other.strip_suffix('+')) {
        (None, None) => one == other,
        (Some(stem), None) => other.starts_with(stem),
        (None, Some(stem)) => one.starts_with(stem),
        (Some(one), Some(other)) => one.starts_with(other) || other.starts_with(one),
    }
}

/// A network as people write it: a single address without its length.
#[must_use]
pub fn shortest(network: &IpNet) -> String {
    match network.prefix_len() == network.max_prefix_len() {
        true => network.addr().to_string(),
        false => network.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_meet_if_one_name_fits_both() {
        let meet = |one, other| {
            let meet = interfaces_meet(Some(one), Some(other));
            assert_eq!(meet, interfaces_meet(Some(other), Some(one)));
            meet
        };
        assert!(meet("eth0", "eth0") && meet("eth+", "eth0") && meet("e+", "eth+"));
        assert!(!meet("eth0", "eth1") && !meet("eth+", "wan0") && !meet("eth+", "wan+"));
        assert!(interfaces_meet(None, Some("eth0")));
    }

    #[test]
    fn networks_meet_if_one_holds_the_other() {
        let meet = |one, other| networks_meet(network(one), network(other));
        assert!(meet("10.0.0.0/8", "10.1.0.0/16") && meet("10.0.0.1", "10.0.0.0/8"));
        assert!(!meet("10.0.0.0/9", "10.128.0.0/9") && !meet("10.0.0.0/8", "fd00::/8"));
        assert!(networks_meet(None, network("fd00::1")));
    }
}
