//! Ports, ranges of ports and sets of ports.

use std::fmt;

/// Ports from `first` to `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// The lowest port.
    pub first: u16,
    /// The highest port, at least `first`.
    pub last: u16,
}

impl PortRange {
    /// Every port there is.
    pub const ALL: Self = Self {
        first: 0,
        last: u16::MAX,
    };

    /// One port or `first:last`; nothing else, and never an empty range.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (first, last) = text.split_once(':').unwrap_or((text, text));
        let first = parse_port(first)?;
        let last = parse_port(last)?;
        (first <= last).then_some(Self { first, last })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(out, "{}", self.first),
            false => write!(out, "{}:{}", self.first, self.last),
        }
    }
}

/// Digits alone: `u16::from_str` would also take a sign.
fn parse_port(text: &str) -> Option<u16> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}

/// A set of ports as sorted ranges that neither overlap nor touch, so that
/// equal sets are equal values. The empty list stands for every port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ports(Vec<PortRange>);

impl Ports {
    /// The union of the ranges; all 65,536 ports become "every port".
    #[must_use]
    pub fn new(mut ranges: Vec<PortRange>) -> Self {
        ranges.sort_unstable();
        let mut merged: Vec<PortRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match merged.last_mut() {
                Some(previous) if u32::from(range.first) <= u32::from(previous.last) + 1 => {
                    previous.last = previous.last.max(range.last);
                }
                _ => merged.push(range),
            }
        }
        if merged == [PortRange::ALL] {
            merged.clear();
        }
        Self(merged)
    }

    /// Returns true if the port is in the set.
    #[must_use]
    pub fn include(&self, port: u16) -> bool {
        let holds = |range: &PortRange| (range.first..=range.last).contains(&port);
        self.0.is_empty() || self.0.iter().any(holds)
    }

    /// Returns true if a port is in both sets.
    #[must_use]
    pub fn meet(&self, other: &Self) -> bool {
        let (one, two) = (self.all_ranges(), other.all_ranges());
        let (mut at, mut beside) = (0, 0);
        while let (Some(left), Some(right)) = (one.get(at), two.get(beside)) {
            if left.last < right.first {
                at += 1;
            } else if right.last < left.first {
                beside += 1;
            } else {
                return true;
            }
        }
        false
    }

    /// The ports of the set that are within a range; `None` if there are none.
    #[must_use]
    pub fn within(&self, range: PortRange) -> Option<Self> {
        let cut = |part: &PortRange| PortRange {
            first: part.first.max(range.first),
            last: part.last.min(range.last),
        };
        let parts = self.all_ranges().iter().map(cut);
        let parts: Vec<_> = parts.filter(|part| part.first <= part.last).collect();
        (!parts.is_empty()).then(|| Self::new(parts))
    }

    /// The union of two sets.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self::new([self.all_ranges(), other.all_ranges()].concat())
    }

    /// The ranges, ascending, also of the set of every port.
    #[must_use]
    pub fn all_ranges(&self) -> &[PortRange] {
        match self.0.is_empty() {
            true => &[PortRange::ALL],
            false => &self.0,
        }
    }

    /// The ranges, ascending; none for every port.
    #[must_use]
    pub fn ranges(&self) -> &[PortRange] {
        &self.0
    }

    /// The set in as few parts as `-m multiport` allows: 15 places in a rule,
    /// of which a range takes two.
    #[must_use]
    pub fn split_for_multiport(&self) -> Vec<Self> {
        const PLACES: usize = 15;
        let mut parts: Vec<Vec<PortRange>> = vec![Vec::new()];
        let mut used = 0;
        for range in &self.0 {
            let places = if range.first == range.last { 1 } else { 2 };
            if used + places > PLACES {
                parts.push(Vec::new());
                used = 0;
            }
            used += places;
            if let Some(part) = parts.last_mut() {
                part.push(*range);
            }
        }
        parts.into_iter().map(Self).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(texts: &[&str]) -> Ports {
        Ports::new(
            texts
                .iter()
                .filter_map(|text| PortRange::parse(text))
                .collect(),
        )
    }

    #[test]
    fn equal_sets_of_ports_are_equal_values() {
        assert_eq!(ports(&["80", "443"]), ports(&["443", "80", "80"]));
        assert_eq!(ports(&["1:5", "6", "4:9"]), ports(&["1:9"]));
        assert_eq!(ports(&["0:65535"]), Ports::default());
        assert_ne!(ports(&["1:65535"]), Ports::default());
    }

    #[test]
    fn a_range_is_digits_and_one_colon() {
        for bad in [
            "", ":", "1:", ":1", "5:1", "+5", "-1", "65536", "1:2:3", " 1", "1-2",
        ] {
            assert_eq!(PortRange::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn sets_of_ports_meet_where_they_share_one() {
        let set = ports(&["80", "443", "1000:2000"]);
        for (other, meets) in [
            (&["443"][..], true),
            (&["1:79", "2000"], true),
            (&["81:442", "2001:65535"], false),
            (&["0:65535"], true),
        ] {
            assert_eq!(set.meet(&ports(other)), meets, "{other:?}");
            assert_eq!(ports(other).meet(&set), meets, "{other:?}");
        }
        let range = |text: &str| PortRange::parse(text).unwrap();
        assert_eq!(
            set.within(range("400:1100")),
            Some(ports(&["443", "1000:1100"]))
        );
        assert_eq!(set.within(range("81:442")), None);
        assert_eq!(ports(&["80"]).and(&ports(&["81"])), ports(&["80:81"]));
    }

    #[test]
    fn fifteen_ranges_take_two_rules_and_fifteen_ports_one() {
        let single: Vec<_> = (1..=15)
            .map(|n| PortRange {
                first: n * 10,
                last: n * 10,
            })
            .collect();
        let double: Vec<_> = (1..=15)
            .map(|n| PortRange {
                first: n * 10,
                last: n * 10 + 1,
            })
            .collect();
        assert_eq!(Ports::new(single).split_for_multiport().len(), 1);
        let parts = Ports::new(double.clone()).split_for_multiport();
        assert_eq!(
            parts
                .iter()
                .map(|part| part.ranges().len())
                .collect::<Vec<_>>(),
            [7, 7, 1]
        );
        let together = parts
            .iter()
            .flat_map(|part| part.ranges().to_vec())
            .collect();
        assert_eq!(Ports::new(together), Ports::new(double));
    }
}
