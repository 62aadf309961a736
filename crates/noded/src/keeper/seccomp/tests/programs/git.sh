git init -q r
cd r
git config user.email a@b
git config user.name n
seq 1000 > f
git add f
git commit -qm 1
git checkout -qb x
echo >> f
git commit -qam 2
git checkout -q -
git merge -q x
cd ..
git clone -q r s
cd s
git gc -q --aggressive
git fsck
git log --stat | cat
git worktree add -q ../w
git stash list
