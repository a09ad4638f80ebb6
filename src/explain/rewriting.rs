//! The destination of a connection after DNAT.

use std::net::IpAddr;

use super::condition::Meaning;
use super::dump::WholeTable;
use super::follow::Class;
use crate::netfilter::Endpoint;

/// Returns true if `--to-destination` is a range of addresses. It counts as one
/// destination: the kernel chooses among them by the addresses of the connection.
#[must_use]
pub fn is_range(to: &str) -> bool {
    to.contains('-') && addresses(to).is_some_and(|(first, last, _)| first != last)
}

/// The first and the last address of `--to-destination`, and the text of the port.
///
/// `10.0.0.1`, `10.0.0.1:80`, `10.0.0.1-10.0.0.4:80-90`, `fd00::1-fd00::4`, `[fd00::1-fd00::4]:80`,
/// and, as some write it, `[fd00::1]-[fd00::4]:80`.
fn addresses(to: &str) -> Option<(IpAddr, IpAddr, Option<&str>)> {
    let (range, port) = match (to.rfind("]:"), to.matches(':').count()) {
        (Some(end), _) => (&to[..=end], Some(&to[end + 2..])),
        (None, 1) => to
            .split_once(':')
            .map(|(range, port)| (range, Some(port)))?,
        (None, _) => (to, None),
    };
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let address = |text: &str| text.trim_matches(['[', ']']).parse().ok();
    Some((address(first)?, address(last)?, port))
}

/// The ends of `--to-destination`: one address, or the first and the last one of a
/// range. None for a range of ports.
#[must_use]
pub fn ends(to: &str) -> Option<[Endpoint; 2]> {
    let (first, last, port) = addresses(to)?;
    let port = port.map(|port| port.parse().ok());
    let port = match port {
        Some(port) => Some(port?),
        None => None,
    };
    Some([first, last].map(|address| Endpoint { address, port }))
}

/// The port that the connections of a class keep where DNAT names none, if it is
/// only one.
#[must_use]
pub fn kept_port(table: &WholeTable, class: &Class) -> Option<u16> {
    class
        .given()
        .find_map(|number| match &table.conditions.get(number).meaning {
            Meaning::Ports(ports) => match ports.ranges() {
                [one] if one.first == one.last => Some(one.first),
                _ => None,
            },
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_addresses_is_no_single_one_and_no_range_of_ports() {
        for range in [
            "10.0.0.1-10.0.0.4",
            "10.0.0.1-10.0.0.4:80",
            "10.0.0.1-10.0.0.4:80-90",
            "fd00::1-fd00::4",
            "[fd00::1-fd00::4]:80",
            "[fd00::1]-[fd00::4]:80",
        ] {
            assert!(is_range(range), "{range}");
        }
        for single in [
            "10.0.0.1",
            "10.0.0.1-10.0.0.1",
            "10.0.0.1:80-90",
            ":80-90",
            "fd00::1",
            "[fd00::1]:80-90",
            "REDIRECT :80-90",
            "NETMAP 10.0.0.0/24",
            "-",
            "",
        ] {
            assert!(!is_range(single), "{single}");
        }
    }

    #[test]
    fn the_ends_of_a_range_have_its_port() {
        let shown = |to: &str| ends(to).map(|ends| ends.map(|end| end.to_string()));
        let both = |first: &str, last: &str| Some([first.to_owned(), last.to_owned()]);
        assert_eq!(shown("10.0.0.1"), both("10.0.0.1", "10.0.0.1"));
        assert_eq!(
            shown("10.0.0.1-10.0.0.4:80"),
            both("10.0.0.1:80", "10.0.0.4:80")
        );
        assert_eq!(shown("fd00::1-fd00::4"), both("fd00::1", "fd00::4"));
        assert_eq!(
            shown("[fd00::1-fd00::4]:80"),
            both("[fd00::1]:80", "[fd00::4]:80")
        );
        assert_eq!(shown("10.0.0.1:80-90"), None);
        assert_eq!(shown("REDIRECT :80"), None);
    }
}
