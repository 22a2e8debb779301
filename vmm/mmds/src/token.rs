//! Session tokens of version 2. They carry when they end and are authenticated by a key of this
//! process's, so that none is remembered: a guest may ask for any number of them.

use std::time::{Duration, Instant};

/// How long a token may be good for, in seconds.
pub const TTL_SECONDS: std::ops::RangeInclusive<u32> = 1..=21_600;

/// Milliseconds until which it is good, and what makes it differ from others.
const CLAIM_BYTES: usize = 16;
/// Hexadecimal digits of a token.
const TOKEN_CHARS: usize = 2 * (CLAIM_BYTES + blake3::OUT_LEN);

/// Gives tokens out, and knows them again. Those of another process, or from before a snapshot, are
/// not known.
pub struct Tokens {
    key: [u8; blake3::KEY_LEN],
    start: Instant,
}

impl Tokens {
    /// With a key of its own.
    pub fn new() -> Result<Self, getrandom::Error> {
        let mut key = [0; blake3::KEY_LEN];
        getrandom::fill(&mut key)?;
        Ok(Self { key, start: Instant::now() })
    }

    /// A token that is good for so long.
    pub fn give(&self, seconds: u32, now: Instant) -> Result<String, getrandom::Error> {
        let until = now.duration_since(self.start) + Duration::from_secs(seconds.into());
        let mut claim = [0; CLAIM_BYTES];
        getrandom::fill(&mut claim)?;
        claim[..8].copy_from_slice(&(until.as_millis() as u64).to_le_bytes());
        let seal = blake3::keyed_hash(&self.key, &claim);
        Ok(claim.iter().chain(seal.as_bytes()).map(|byte| format!("{byte:02x}")).collect())
    }

    /// Whether it was given out and is still good.
    pub fn is_good(&self, token: &[u8], now: Instant) -> bool {
        let Some(bytes) = bytes(token) else { return false };
        let (claim, seal) = bytes.split_at(CLAIM_BYTES);
        let Ok(seal) = <[u8; blake3::OUT_LEN]>::try_from(seal) else { return false };
        // Compared in constant time.
        if blake3::keyed_hash(&self.key, claim) != blake3::Hash::from_bytes(seal) {
            return false;
        }
        let until = claim.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        now.duration_since(self.start) < Duration::from_millis(until)
    }
}

fn bytes(token: &[u8]) -> Option<Vec<u8>> {
    if token.len() != TOKEN_CHARS || !token.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    token.chunks(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_until_it_ends_and_no_other_is() {
        let (tokens, others) = (Tokens::new().unwrap(), Tokens::new().unwrap());
        let now = Instant::now();
        let token = tokens.give(60, now).unwrap();
        assert!(tokens.is_good(token.as_bytes(), now));
        assert!(tokens.is_good(token.as_bytes(), now + Duration::from_secs(59)));
        assert!(!tokens.is_good(token.as_bytes(), now + Duration::from_secs(61)));
        assert!(!others.is_good(token.as_bytes(), now));
        assert_ne!(token, tokens.give(60, now).unwrap());
        for at in 0..token.len() {
            let mut wrong = token.clone().into_bytes();
            wrong[at] = if wrong[at] == b'0' { b'1' } else { b'0' };
            assert!(!tokens.is_good(&wrong, now), "digit {at}");
            assert!(!tokens.is_good(&token.as_bytes()[..at], now));
        }
        assert!(!tokens.is_good(&[0xff; TOKEN_CHARS], now));
    }
}
