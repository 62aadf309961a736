# The server refuses to be root.
as=''
if [ "$(id -u)" = 0 ]; then
    chmod 777 .
    as='setpriv --reuid=65534 --regid=65534 --clear-groups'
fi
$as initdb -D data -A trust > /dev/null
$as pg_ctl -D data -o "-k $PWD -h ''" -l log -w start
$as psql -h "$PWD" -d postgres -U "$($as id -un)" -c 'create table t as select generate_series(1, 1000) n' -c checkpoint
$as pg_ctl -D data -w stop
