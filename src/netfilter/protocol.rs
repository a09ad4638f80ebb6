//! Transport protocols with ports.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A transport protocol with ports: the protocols that can be balanced by port.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    JsonSchema,
)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
    Sctp,
    Dccp,
}

impl Protocol {
    /// All with their names.
    pub const WORDS: [(&'static str, Self); 4] = [
        (Self::Tcp.as_str(), Self::Tcp),
        (Self::Udp.as_str(), Self::Udp),
        (Self::Sctp.as_str(), Self::Sctp),
        (Self::Dccp.as_str(), Self::Dccp),
    ];

    /// The name of the protocol and of the match that reads its ports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
            Self::Dccp => "dccp",
        }
    }

    /// IANA's number of the protocol.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
            Self::Dccp => 33,
        }
    }

    /// The argument of `-p`: a name that iptables knows by itself, or else the
    /// number, because `/etc/protocols` is missing in small containers.
    #[must_use]
    pub fn argument(self) -> &'static str {
        match self {
            Self::Dccp => "33",
            known => known.as_str(),
        }
    }

    /// Reads a name or a number, as `iptables-save` prints either.
    #[must_use]
    pub fn from_argument(text: &str) -> Option<Self> {
        let named = |(name, protocol): &(&str, Self)| {
            *name == text || protocol.number().to_string() == text
        };
        Self::WORDS
            .into_iter()
            .find(named)
            .map(|(_, protocol)| protocol)
    }
}
