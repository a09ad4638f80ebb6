//! Programs of classic BPF that decide by a hash of the client, as `-m bpf
//! --bytecode` takes them.
//!
//! A [`HashMatch`] describes a program. The program reads the words of the source
//! address from the packet, and with [`HashKey::Connection`] the source port. It mixes them
//! with a seed into 32 bits, and matches when these are below a threshold. So a threshold is a
//! whole number of 2^-32, and the same client gets the same answer from every
//! kernel and at any time.
//!
//! The mixing is the end of `MurmurHash3`, with one more multiplication before
//! it. All arithmetic wraps at 32 bits, as the kernel's does for such programs. Each further word
//! goes through a round of its own, so that no two bits of an address cancel out for every seed.
//!
//! A program that differs from the one of its description in a single word is foreign:
//! [`HashMatch::parse`] does not recognise it.

use std::fmt;

use super::Family;

/// The part of a packet that the hash is computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HashKey {
    /// The client's address.
    Source,
    /// The client's address and port. An IPv6 packet with an extension header
    /// before its ports counts as one of port 0.
    Connection,
}

/// The hash that the programs of a balancer compute, without the seed of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hasher {
    /// The family of the packets.
    pub family: Family,
    /// The part of the packet.
    pub key: HashKey,
    /// The number of leading bits of the address that count, at least 1.
    pub prefix: u8,
}

/// A match on packets whose hash is below a threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HashMatch {
    /// The hash.
    pub hasher: Hasher,
    /// The number that makes it one of many independent ones.
    pub seed: u32,
    /// The threshold: so many of the 2^32 hashes match.
    pub below: u32,
}

/// An instruction, as `struct sock_filter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// The operation.
    pub code: u16,
    /// The instructions to skip if a comparison holds.
    pub if_true: u8,
    /// The instructions to skip if it does not.
    pub if_false: u8,
    /// The operand.
    pub operand: u32,
}

// The operations in use (`linux/bpf_common.h`): A is the accumulator, X the
// index register, M[0] a word of memory, K the operand.
const LOAD_IMMEDIATE: u16 = 0x00; // A = K
const LOAD_WORD: u16 = 0x20; // A = the word at K
const LOAD_HALF: u16 = 0x28; // A = the half word at K
const LOAD_BYTE: u16 = 0x30; // A = the byte at K
const LOAD_HALF_INDEXED: u16 = 0x48; // A = the half word at X + K
const LOAD_HEADER_LENGTH: u16 = 0xb1; // X = 4 * (the byte at K & 15)
const LOAD_INDEX: u16 = 0x61; // X = M[K]
const STORE: u16 = 0x02; // M[K] = A
const AND: u16 = 0x54; // A &= K
const MULTIPLY: u16 = 0x24; // A *= K
const XOR: u16 = 0xa4; // A ^= K
const XOR_INDEX: u16 = 0xac; // A ^= X
const SHIFT_RIGHT: u16 = 0x74; // A >>= K
const COPY_TO_INDEX: u16 = 0x07; // X = A
const JUMP: u16 = 0x05; // skip K
const JUMP_IF_EQUAL: u16 = 0x15; // A == K
const JUMP_IF_NOT_BELOW: u16 = 0x35; // A >= K
const RETURN: u16 = 0x06; // K

/// The odd numbers that the hash is multiplied by.
const ROUND: u32 = 0x9e37_79b1;
const LAST: [u32; 2] = [0x85eb_ca6b, 0xc2b2_ae35];

/// The IPv6 headers that are followed by ports: TCP, UDP, DCCP, SCTP.
const WITH_PORTS: [u32; 4] = [6, 17, 33, 132];

impl Hasher {
    /// The offset of the source address, and that of the first word after it.
    fn address(self) -> (u32, u32) {
        match self.family {
            Family::Ipv4 => (12, 16),
            Family::Ipv6 => (8, 24),
        }
    }

    /// The words of the address that count, each with a mask.
    fn words(self) -> impl Iterator<Item = (u32, u32)> {
        let (first, end) = self.address();
        let prefix = u32::from(self.prefix);
        let words = (first..end).step_by(4).zip((0..).step_by(32));
        words
            .filter(move |(_, bits)| *bits < prefix)
            .map(move |(offset, bits)| {
                (
                    offset,
                    u32::MAX << 32_u32.saturating_sub(prefix - bits).min(31),
                )
            })
    }
}

impl HashMatch {
    /// The program.
    #[must_use]
    pub fn program(&self) -> Vec<Instruction> {
        let mut program = Program::default();
        for (at, (offset, mask)) in self.hasher.words().enumerate() {
            if at > 0 {
                program.round();
            }
            program.add(LOAD_WORD, offset);
            if mask != u32::MAX {
                program.add(AND, mask);
            }
            match at {
                0 => program.add(XOR, self.seed),
                _ => program.add(XOR_INDEX, 0),
            }
        }
        if self.hasher.key == HashKey::Connection {
            program.port(self.hasher.family);
        }
        program.last(self.below);
        program.0
    }

    /// Recognises a program that has the words of one of ours.
    #[must_use]
    pub fn of_program(program: &[Instruction]) -> Option<Self> {
        let operand =
            |code| move |found: &Instruction| (found.code == code).then_some(found.operand);
        let first = |code| program.iter().find_map(operand(code));
        let words = program.iter().filter_map(operand(LOAD_WORD)).count();
        let masked = first(AND).map_or(0, u32::leading_ones);
        let masked = usize::try_from(masked).ok()?;
        let prefix = match masked {
            0 => 32 * words,
            _ => 32 * words.checked_sub(1)? + masked,
        };
        let loads_port = |found: &Instruction| matches!(found.code, LOAD_HALF | LOAD_HALF_INDEXED);
        let hasher = Hasher {
            family: match first(LOAD_WORD)? {
                12 => Family::Ipv4,
                _ => Family::Ipv6,
            },
            key: match program.iter().any(loads_port) {
                true => HashKey::Connection,
                false => HashKey::Source,
            },
            prefix: u8::try_from(prefix).ok()?,
        };
        let found = Self {
            hasher,
            seed: first(XOR)?,
            below: first(JUMP_IF_NOT_BELOW)?,
        };
        (found.program() == program).then_some(found)
    }

    /// Recognises the argument of `--bytecode`.
    #[must_use]
    pub fn parse(bytecode: &str) -> Option<Self> {
        let mut parts = bytecode.split(',');
        let count: usize = parts.next()?.parse().ok()?;
        let program: Option<Vec<Instruction>> = parts.map(Instruction::parse).collect();
        let program = program.filter(|program| program.len() == count)?;
        Self::of_program(&program)
    }
}

/// The argument of `--bytecode`: the number of instructions, and each of them.
impl fmt::Display for HashMatch {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = self.program();
        write!(out, "{}", program.len())?;
        program.iter().try_for_each(|instruction| {
            let Instruction {
                code,
                if_true,
                if_false,
                operand,
            } = instruction;
            write!(out, ",{code} {if_true} {if_false} {operand}")
        })
    }
}

impl Instruction {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let found = Self {
            code: words.next()?.parse().ok()?,
            if_true: words.next()?.parse().ok()?,
            if_false: words.next()?.parse().ok()?,
            operand: words.next()?.parse().ok()?,
        };
        words.next().is_none().then_some(found)
    }
}

/// A program in the making. Between two steps A is the hash so far.
#[derive(Default)]
struct Program(Vec<Instruction>);

impl Program {
    fn add(&mut self, code: u16, operand: u32) {
        self.jump(code, operand, [0, 0]);
    }

    fn jump(&mut self, code: u16, operand: u32, [if_true, if_false]: [u8; 2]) {
        self.0.push(Instruction {
            code,
            if_true,
            if_false,
            operand,
        });
    }

    /// A ^= A >> bits
    fn fold(&mut self, bits: u32) {
        self.add(COPY_TO_INDEX, 0);
        self.add(SHIFT_RIGHT, bits);
        self.add(XOR_INDEX, 0);
    }

    /// Mixes what there is, and keeps it in X, for the next word.
    fn round(&mut self) {
        self.add(MULTIPLY, ROUND);
        self.fold(15);
        self.add(COPY_TO_INDEX, 0);
    }

    /// Adds the source port.
    fn port(&mut self, family: Family) {
        self.add(MULTIPLY, ROUND);
        self.fold(15);
        self.add(STORE, 0);
        match family {
            Family::Ipv4 => {
                self.add(LOAD_HEADER_LENGTH, 0);
                self.add(LOAD_HALF_INDEXED, 0);
            }
            Family::Ipv6 => {
                self.add(LOAD_BYTE, 6);
                let to_port = [5, 4, 3, 2];
                for (protocol, skip) in WITH_PORTS.into_iter().zip(to_port) {
                    self.jump(JUMP_IF_EQUAL, protocol, [skip, 0]);
                }
                self.add(LOAD_IMMEDIATE, 0);
                self.add(JUMP, 1);
                self.add(LOAD_HALF, 40);
            }
        }
        self.add(LOAD_INDEX, 0);
        self.add(XOR_INDEX, 0);
    }

    /// The last rounds, and the comparison.
    fn last(&mut self, below: u32) {
        self.add(MULTIPLY, ROUND);
        self.fold(16);
        self.add(MULTIPLY, LAST[0]);
        self.fold(13);
        self.add(MULTIPLY, LAST[1]);
        self.fold(16);
        self.jump(JUMP_IF_NOT_BELOW, below, [0, 1]);
        self.add(RETURN, 0);
        self.add(RETURN, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matches() -> impl Strategy<Value = HashMatch> {
        let hasher =
            (any::<bool>(), any::<bool>(), 1..=128_u8).prop_map(|(ipv4, source, prefix)| {
                let family = [Family::Ipv6, Family::Ipv4][usize::from(ipv4)];
                Hasher {
                    family,
                    key: [HashKey::Connection, HashKey::Source][usize::from(source)],
                    prefix: match family {
                        Family::Ipv4 => (prefix - 1) % 32 + 1,
                        Family::Ipv6 => prefix,
                    },
                }
            });
        let edge = prop_oneof![any::<u32>(), prop::sample::select(vec![0, 1, 12, u32::MAX])];
        (hasher, edge.clone(), edge).prop_map(|(hasher, seed, below)| HashMatch {
            hasher,
            seed,
            below,
        })
    }

    #[test]
    fn the_program_of_an_ipv4_client_has_17_instructions() {
        let of_client = HashMatch {
            hasher: Hasher {
                family: Family::Ipv4,
                key: HashKey::Source,
                prefix: 32,
            },
            seed: 7,
            below: 1 << 30,
        };
        assert_eq!(
            of_client.to_string(),
            "17,32 0 0 12,164 0 0 7,36 0 0 2654435761,7 0 0 0,116 0 0 16,172 0 0 0,36 0 0 2246822507,7 0 0 0,116 0 0 13,\
             172 0 0 0,36 0 0 3266489909,7 0 0 0,116 0 0 16,172 0 0 0,53 0 1 1073741824,6 0 0 0,6 0 0 1"
        );
    }

    proptest! {
        #[test]
        fn a_program_tells_its_description(of_client in matches()) {
            prop_assert_eq!(HashMatch::parse(&of_client.to_string()), Some(of_client));
        }

        #[test]
        fn a_program_fits_into_the_kernels_limit(of_client in matches()) {
            prop_assert!(of_client.program().len() <= 64);
        }

        #[test]
        fn another_word_makes_it_foreign_or_another_description(of_client in matches(), at in any::<prop::sample::Index>(), bit in 0..64_u32) {
            let mut program = of_client.program();
            let at = at.index(program.len());
            let instruction = &mut program[at];
            match bit {
                0..=31 => instruction.operand ^= 1 << bit,
                32..=47 => instruction.code ^= 1 << (bit - 32),
                48..=55 => instruction.if_true ^= 1 << (bit - 48),
                _ => instruction.if_false ^= 1 << (bit - 56),
            }
            let read = HashMatch::of_program(&program);
            prop_assert_ne!(read, Some(of_client));
            prop_assert!(read.is_none_or(|read| read.program() == program));
        }
    }

    #[test]
    fn only_whole_programs_are_parsed() {
        let ours = "17,32 0 0 12,164 0 0 7,36 0 0 2654435761,7 0 0 0,116 0 0 16,172 0 0 0,36 0 0 2246822507,7 0 0 0,116 0 0 13,\
                    172 0 0 0,36 0 0 3266489909,7 0 0 0,116 0 0 16,172 0 0 0,53 0 1 5,6 0 0 0,6 0 0 1";
        assert!(HashMatch::parse(ours).is_some());
        let shortened = ours.replacen("17,", "16,", 1);
        let longer = ours.replacen("17,", "18,", 1) + ",6 0 0 1";
        let spaced = ours.replacen("32 0 0 12", "32  0 0 12", 1);
        for other in [
            "",
            "0",
            "1,6 0 0 1",
            "4,32 0 0 12,53 0 1 5,6 0 0 0,6 0 0 1",
            &shortened,
            &longer,
            &spaced,
            &ours.replacen("53 0 1 5", "53 0 1 5 5", 1),
            &ours.replacen("53 0 1 5", "53 0 1 4294967296", 1),
        ] {
            assert_eq!(HashMatch::parse(other), None, "{other}");
        }
    }
}
