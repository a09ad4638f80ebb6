#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| iptables_balance_fuzz::fuzzed::host(input));
