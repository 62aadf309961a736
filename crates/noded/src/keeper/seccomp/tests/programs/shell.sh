# Pipes, job control, archives, links, copies, limits.
bash -c 'coproc cat; echo hi >&"${COPROC[1]}"; read -r line <&"${COPROC[0]}"; [ "$line" = hi ]'
mkdir -p a/b
seq 1000 > a/b/seq
cp --reflink=auto -a a c
mv c d
ln -s d e
ln d/b/seq f
mkfifo p
tar czf a.tar.gz a d
mkdir x
tar xzf a.tar.gz -C x
cmp a/b/seq x/d/b/seq
find . -type f -print0 | xargs -0 -P4 -n1 sha256sum | sort -u | wc -l
sort -R a/b/seq | sort -n --parallel=2 | cmp - a/b/seq
timeout 5 nice -n 5 ionice -c 3 sh -c 'ulimit -n 100; sync f; df .; stat f; date; uname -a; id; nproc'
chmod 600 f
touch -d 2020-01-01 f
truncate -s 10M big
fallocate -l 1M big2
dd if=big of=big3 bs=1M status=none
