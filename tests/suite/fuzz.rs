//! A short run of the fuzz targets on every test run: all recorded inputs, and
//! variations of them, the same each time. `FUZZ` says how many of each, `SEED`
//! which.

use std::fs;
use std::path::Path;

use crate::dice::Dice;
use crate::fuzzed;

/// Words that variations are made of, so that they hit upon meaningful ones.
const WORDS: [&str; 26] = [
    "\"",
    "\\",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\n",
    "-A W ",
    "-j W\n",
    "! ",
    "\"weight\": ",
    "\"balancers\": [",
    "{\"name\": \"a\", ",
    "null",
    "true",
    "0",
    "-1",
    "4294967296",
    "10.9.0.1",
    "fd09::1",
    "[fd09::1]:80",
    "*nat\n",
    "COMMIT\n",
    "\u{0}",
];

impl Dice {
    fn varied(&mut self, inputs: &[Vec<u8>]) -> Vec<u8> {
        let mut input = inputs[self.throw(inputs.len())].clone();
        for _ in 0..=self.throw(4) {
            let at = self.throw(input.len() + 1);
            let end = (at + self.throw(12)).min(input.len());
            match self.throw(5) {
                0 => drop(input.drain(at..end)),
                1 => drop(input.splice(at..at, WORDS[self.throw(WORDS.len())].bytes())),
                2 => drop(input.splice(at..end, WORDS[self.throw(WORDS.len())].bytes())),
                3 => {
                    let other = &inputs[self.throw(inputs.len())];
                    let from = self.throw(other.len() + 1);
                    drop(input.splice(at.., other[from..].iter().copied()));
                }
                _ => {
                    if let Some(byte) = input.get_mut(at) {
                        *byte ^= 1 << self.throw(8);
                    }
                }
            }
        }
        input
    }
}

fn run(target: &str, body: fn(&[u8])) {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>().unwrap())
    };
    let seed = number("SEED").unwrap_or(1);
    println!("SEED={seed}");
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = fs::read_dir(corpus)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let inputs: Vec<Vec<u8>> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    assert!(inputs.len() >= 3, "{target} has no inputs");
    inputs.iter().for_each(|input| body(input));
    let mut dice = Dice(seed);
    for _ in 0..number("FUZZ").unwrap_or(3000) {
        let input = dice.varied(&inputs);
        let tried = std::panic::catch_unwind(|| body(&input));
        assert!(
            tried.is_ok(),
            "{target} fails for {:?}",
            String::from_utf8_lossy(&input)
        );
    }
}

#[test]
fn any_request() {
    run("request", fuzzed::request);
}

#[test]
fn any_dump() {
    run("dump", fuzzed::dump);
}

#[test]
fn any_session_of_cfengine() {
    run("session", fuzzed::session);
}

#[test]
fn any_request_on_any_host() {
    run("host", fuzzed::host);
}
