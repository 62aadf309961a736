//! The sandboxes that are attached, by id.

use super::link::Link;
use super::problem::Problem;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use subtle::ConstantTimeEq as _;
use tokio::sync::watch;

/// What every exec of a sandbox gets unless its request says otherwise.
#[derive(Clone, Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessDefaults {
    /// `NAME=value` each.
    #[serde(default)]
    pub env: Vec<String>,
    /// Absolute; made when it does not exist.
    #[serde(default)]
    pub cwd: String,
    /// Empty: root.
    #[serde(default)]
    pub user: String,
}

/// The secret that opens one sandbox's data plane.
pub struct Token(String);

impl Token {
    /// Wraps the secret.
    pub fn new(secret: String) -> Self {
        Self(secret)
    }
    /// Compares in a time that does not depend on where the two differ.
    pub fn matches(&self, candidate: &[u8]) -> bool {
        bool::from(self.0.as_bytes().ct_eq(candidate))
    }
    /// Whether somebody who knows the secret made this code for this message.
    pub fn vouches(&self, message: &str, code: &[u8]) -> bool {
        // HMAC takes keys of any length; its comparison takes the same time wherever the two differ.
        Hmac::<Sha256>::new_from_slice(self.0.as_bytes())
            .is_ok_and(|mac| mac.chain_update(message).verify_slice(code).is_ok())
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// An attached sandbox.
#[derive(Clone)]
pub struct Attached {
    /// Its agent connection.
    pub link: Arc<Link>,
    /// Where the agent listens.
    pub socket: PathBuf,
    /// Number that its agent was started with.
    pub generation: u64,
    /// Who knows it may use the data plane.
    pub token: Arc<Token>,
    /// Defaults of its execs.
    pub defaults: Arc<ProcessDefaults>,
    /// Ports that anybody may use.
    pub public_ports: Arc<watch::Sender<BTreeSet<u16>>>,
}

impl Attached {
    /// Waits until a port is not public, or no longer.
    pub async fn private(&self, port: u16) {
        // The sender is ours, so that it cannot be gone.
        let _ = self.public_ports.subscribe().wait_for(|ports| !ports.contains(&port)).await;
    }

    /// Lets a request through, or not, by its `Authorization` header.
    pub fn authorize(&self, header: Option<&[u8]>) -> Result<(), Problem> {
        let Some(header) = header else { return Err(Problem::unauthenticated("no access token was sent")) };
        let (scheme, token) = header.split_at_checked(7).unwrap_or((header, &[]));
        if !scheme.eq_ignore_ascii_case(b"bearer ") || !self.token.matches(token.trim_ascii()) {
            return Err(Problem::unauthenticated("the access token is not this sandbox's"));
        }
        Ok(())
    }
}

/// All attached sandboxes.
#[derive(Default)]
pub struct Registry(Mutex<HashMap<String, Attached>>);

impl Registry {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Attached>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// The sandbox of this id.
    pub fn get(&self, id: &str) -> Option<Attached> {
        self.lock().get(id).cloned()
    }
    /// Puts a sandbox in, and hands back the one it replaces.
    pub fn insert(&self, id: String, attached: Attached) -> Option<Attached> {
        self.lock().insert(id, attached)
    }
    /// Says which ports of a sandbox anybody may use; false when there is no such sandbox.
    pub fn publish(&self, id: &str, ports: BTreeSet<u16>) -> bool {
        let Some(attached) = self.get(id) else { return false };
        attached.public_ports.send_replace(ports);
        true
    }
    /// Takes a sandbox out.
    pub fn remove(&self, id: &str) -> Option<Attached> {
        self.lock().remove(id)
    }
    /// Takes a sandbox out if it still has this connection.
    pub fn remove_link(&self, id: &str, link: &Arc<Link>) {
        let mut sandboxes = self.lock();
        if sandboxes.get(id).is_some_and(|attached| Arc::ptr_eq(&attached.link, link)) {
            sandboxes.remove(id);
        }
    }
}
