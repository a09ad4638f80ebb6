//! An interpreter of classic BPF, and the way of a client through chains that
//! decide by such programs. It knows the text of `iptables-save` only, and shares
//! no code with the program.

use std::collections::HashMap;
use std::net::IpAddr;

/// A program as `--bytecode` has it: code, jumps and operand of each instruction.
#[derive(Clone, Debug)]
pub struct Program(Vec<(u16, u8, u8, u32)>);

impl Program {
    pub fn parse(bytecode: &str) -> Self {
        let (count, instructions) = bytecode.split_once(',').unwrap();
        let instruction = |text: &str| {
            let words: Vec<u64> = text.split(' ').map(|word| word.parse().unwrap()).collect();
            let [code, if_true, if_false, operand] = words[..] else {
                panic!("{text}")
            };
            (
                code.try_into().unwrap(),
                if_true.try_into().unwrap(),
                if_false.try_into().unwrap(),
                operand.try_into().unwrap(),
            )
        };
        let program: Vec<_> = instructions.split(',').map(instruction).collect();
        assert_eq!(count, program.len().to_string(), "{bytecode}");
        assert!(program.len() <= 64, "{bytecode}");
        Self(program)
    }

    /// The number that the program returns; 0 where it reads beyond the packet.
    pub fn run(&self, packet: &[u8]) -> u32 {
        let (mut a, mut x, mut memory) = (0_u32, 0_u32, [0_u32; 16]);
        let mut at = 0;
        let load = |offset: u32, bytes: usize| {
            let from = offset as usize;
            let found = packet.get(from..from + bytes)?;
            Some(
                found
                    .iter()
                    .fold(0, |sum, byte| sum << 8 | u32::from(*byte)),
            )
        };
        loop {
            let (code, if_true, if_false, k) = self.0[at];
            at += 1;
            let mut branch = |holds| at += usize::from(if holds { if_true } else { if_false });
            let loaded = match code {
                0x20 => load(k, 4),
                0x28 => load(k, 2),
                0x30 => load(k, 1),
                0x48 => load(x.wrapping_add(k), 2),
                0xb1 => load(k, 1).map(|byte| (byte & 15) * 4),
                _ => Some(0),
            };
            let Some(loaded) = loaded else { return 0 };
            match code {
                0x20 | 0x28 | 0x30 | 0x48 => a = loaded,
                0xb1 => x = loaded,
                0x00 => a = k,
                0x61 => x = memory[k as usize],
                0x02 => memory[k as usize] = a,
                0x54 => a &= k,
                0x24 => a = a.wrapping_mul(k),
                0xa4 => a ^= k,
                0xac => a ^= x,
                0x74 => a >>= k,
                0x07 => x = a,
                0x05 => at += k as usize,
                0x15 => branch(a == k),
                0x35 => branch(a >= k),
                0x06 => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }
}

/// The first packet of a client: an IP header and the beginning of TCP's.
pub fn packet(source: IpAddr, port: u16) -> Vec<u8> {
    let mut packet = match source {
        IpAddr::V4(address) => {
            let mut header = vec![0x45; 12];
            header[9] = 6;
            header.extend(address.octets());
            header.extend([10, 8, 0, 1]);
            header
        }
        IpAddr::V6(address) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 20, 6, 64];
            header.extend(address.octets());
            header.extend([0xfd; 16]);
            header
        }
    };
    packet.extend(port.to_be_bytes());
    packet.extend([0; 18]);
    packet
}

/// The rules of chains that decide by programs.
pub struct Chains(HashMap<String, Vec<(Vec<Program>, String)>>);

impl Chains {
    /// Reads the lines `-A CHAIN ...` of a dump that stand in these chains.
    pub fn read(dump: &str, name: &str) -> Self {
        let mut chains: HashMap<String, Vec<_>> = HashMap::new();
        for line in dump.lines() {
            let Some((chain, rule)) = line
                .split_once("-A ")
                .and_then(|(_, rest)| rest.split_once(' '))
            else {
                continue;
            };
            if chain != name && !chain.starts_with(&format!("{name}/")) {
                continue;
            }
            let mut pieces = rule.split("--bytecode \"").skip(1);
            let programs: Vec<Program> = pieces
                .by_ref()
                .map(|piece| Program::parse(piece.split('"').next().unwrap()))
                .collect();
            let target = rule.rsplit(' ').next().unwrap().to_owned();
            assert!(!rule.contains("statistic"), "{line}");
            chains
                .entry(chain.to_owned())
                .or_default()
                .push((programs, target));
        }
        Self(chains)
    }

    /// The target that a packet reaches.
    pub fn decide(&self, chain: &str, packet: &[u8]) -> &str {
        let matching = |(programs, _): &&(Vec<Program>, String)| {
            programs.iter().all(|program| program.run(packet) != 0)
        };
        let (_, target) = self.0[chain].iter().find(matching).expect("a last rule");
        match self.0.contains_key(target) {
            true => self.decide(target, packet),
            false => target,
        }
    }
}
