cat > a.rs <<'END'
fn main() {
    std::thread::spawn(|| println!("hi")).join().unwrap();
    std::process::Command::new("true").status().unwrap();
    std::fs::copy("a.rs", "b.rs").unwrap();
}
END
rustc -O a.rs
./a
